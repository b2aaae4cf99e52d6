"""GetStatus' answer: the daemon's plain status as a protobuf message. Knows where none of the figures come from."""

from google.protobuf.timestamp_pb2 import Timestamp

from iotd.events import (
    Answered,
    CameraStatus,
    CostStatus,
    EngineStatus,
    LinkStatus,
    ServerStatus,
)
from iotd.rpc.answer import to_timings, to_usage
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
        forks_in_use=engine.forks,
        sessions=engine.sessions,
        readings_by_sensor=engine.readings,
        cameras=map(_camera, engine.cameras),
        recent_answers=map(_answered, engine.recent),
        costs=_costs(engine.costs),
        soc_temperature_celsius=status.temperature_c,
        resident_memory_bytes=status.resident_nbytes,
        mqtt=_mqtt(status.link) if status.link else None,
        counters=engine.counters,
    )


def _answered(answer: Answered) -> iotd_pb2.AnswerSummary:
    return iotd_pb2.AnswerSummary(
        request_id=answer.request_id,
        outcome=answer.outcome,
        budget=duration(answer.budget_s),
        usage=to_usage(answer.usage),
        timings=to_timings(answer.timings) if answer.timings.total_s else None,
        predicted=duration(answer.predicted_s) if answer.predicted_s else None,
    )


def _costs(costs: CostStatus) -> iotd_pb2.CostStatus:
    return iotd_pb2.CostStatus(
        fork=duration(costs.fork_s),
        prefill_run=duration(costs.prefill_run_s),
        prefill_token=duration(costs.prefill_token_s),
        decode_token=duration(costs.decode_token_s),
        slow_decode_token=duration(costs.slow_decode_token_s),
        image_token=duration(costs.image_token_s) if costs.image_token_s else None,
        predictions=costs.predictions,
        median_error=costs.median_error,
        high_error=costs.high_error,
        slow_refusal=duration(costs.slow_refusal_s) if costs.slow_refusal_s else None,
    )


def _context(engine: EngineStatus) -> iotd_pb2.ContextStatus:
    return iotd_pb2.ContextStatus(
        tokens=engine.context_tokens,
        window_tokens=engine.context_window,
        oldest_event_time=_timestamp(engine.oldest_event_s),
        newest_event_time=_timestamp(engine.newest_event_s),
    )


def _camera(camera: CameraStatus) -> iotd_pb2.CameraStatus:
    return iotd_pb2.CameraStatus(
        camera=camera.camera,
        newest_frame_time=_timestamp(camera.newest_s),
        frames=camera.frames,
        replaced_frames=camera.replaced,
        refused_frames=camera.refused,
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
