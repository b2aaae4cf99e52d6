"""The network: arrays in, arrays out. No clock, no thread, no socket."""

from iotd.model.model import Model
from iotd.model.state import State

__all__ = ["Model", "State"]
