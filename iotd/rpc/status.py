"""GetStatus' answer: the daemon's plain status as a protobuf message. Knows where none of the figures come from."""

from google.protobuf.timestamp_pb2 import Timestamp

from iotd.events import EngineStatus, LinkStatus, ServerStatus
from iotd.rpc.times import duration
from iotd.v1 import iotd_pb2


def to_response(status: ServerStatus) -> iotd_pb2.GetStatusResponse:
    """The daemon's status on the wire."""
    engine = status.engine
    return iotd_pb2.GetStatusResponse(
        version=status.version,
        model=engine.model,
        state=f"SERVING_STATE_{status.state.name}",
        uptime=duration(status.uptime_s),
        context=_context(engine),
        queue_depth=engine.queue_depth,
        backlog=engine.backlog,
        state_bytes=engine.state_nbytes,
        sessions=engine.sessions,
        resident_memory_bytes=status.resident_nbytes,
        mqtt=_mqtt(status.link) if status.link else None,
        counters=engine.counters,
    )


def _context(engine: EngineStatus) -> iotd_pb2.ContextStatus:
    return iotd_pb2.ContextStatus(
        tokens=engine.context_tokens,
        window_tokens=engine.context_window,
        oldest_event_time=_timestamp(engine.oldest_event_s),
        newest_event_time=_timestamp(engine.newest_event_s),
    )


def _mqtt(link: LinkStatus) -> iotd_pb2.MqttStatus:
    return iotd_pb2.MqttStatus(
        connected=link.connected,
        broker=link.broker,
        protocol=link.protocol,
        reconnects=link.reconnects,
        counters=link.counters,
    )


def _timestamp(unix_s: float) -> Timestamp | None:
    """None, which leaves the field unset, where there is no event."""
    if not unix_s:
        return None
    stamp = Timestamp()
    # A float of this size resolves a quarter of a microsecond: finer digits would be noise.
    stamp.FromMicroseconds(round(unix_s * 1e6))
    return stamp
