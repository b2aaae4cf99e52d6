"""The thread that owns the model: its warm context, and the asks over it."""

from iotd.engine.call import Sink, Ticket
from iotd.engine.engine import Engine
from iotd.engine.snapshot import Snapshot

__all__ = ["Engine", "Sink", "Snapshot", "Ticket"]
