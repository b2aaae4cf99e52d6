"""The gRPC face of iotd: the server, its checks, and its error mapping."""

from iotd.rpc.server import Server
from iotd.rpc.service import AskEngine, Ticket

__all__ = ["AskEngine", "Server", "Ticket"]
