"""How an answer comes about, as protobuf messages: its events, its tokens and its times. Knows no call and no clock."""

from iotd.events import Accepted, Delta, Done, LabelScore, Plan, Timings, Usage
from iotd.rpc.times import duration
from iotd.v1 import iotd_pb2


def to_ask_event(event: Accepted | Delta | Done) -> iotd_pb2.AskEvent:
    match event:
        case Accepted(request_id, position, plan):
            accepted = iotd_pb2.AskAccepted(request_id=request_id, queue_position=position, plan=to_plan(plan))
            return iotd_pb2.AskEvent(accepted=accepted)
        case Delta(text, thought):
            return iotd_pb2.AskEvent(delta=iotd_pb2.AskDelta(text=text, thought=thought))
        case Done() as done:
            reason = f"FINISH_REASON_{done.finish_reason.name}"
            usage, timings = to_usage(done.usage), to_timings(done.timings)
            ended = iotd_pb2.AskDone(finish_reason=reason, session=done.session, usage=usage, timings=timings)
            return iotd_pb2.AskEvent(done=ended)


def to_classification(accepted: Accepted, done: Done) -> iotd_pb2.ClassifyResponse:
    """done: of an ask with labels that was not cancelled."""
    assert done.weighed is not None
    return iotd_pb2.ClassifyResponse(
        labels=map(_label, done.weighed.labels),
        none_probability=done.weighed.none_probability,
        request_id=accepted.request_id,
        usage=to_usage(done.usage),
        timings=to_timings(done.timings),
    )


def _label(score: LabelScore) -> iotd_pb2.LabelProbability:
    return iotd_pb2.LabelProbability(
        label=score.label, probability=score.probability, log_probability=score.log_probability
    )


def to_usage(usage: Usage) -> iotd_pb2.Usage:
    return iotd_pb2.Usage(
        context_tokens=usage.context_tokens,
        prompt_tokens=usage.prompt_tokens,
        image_tokens=usage.image_tokens,
        generation_tokens=usage.generation_tokens,
    )


def to_plan(plan: Plan) -> iotd_pb2.Plan:
    return iotd_pb2.Plan(
        answer_tokens=plan.answer_tokens,
        reserved_tokens=plan.reserved_tokens,
        thinking_tokens=plan.thinking_tokens,
        image_tokens=plan.image_tokens,
        predicted=to_timings(plan.predicted),
    )


def to_timings(timings: Timings) -> iotd_pb2.Timings:
    return iotd_pb2.Timings(
        queue=duration(timings.queue_s),
        image=duration(timings.image_s),
        prefill=duration(timings.prefill_s),
        decode=duration(timings.decode_s),
        first_token=duration(timings.first_token_s) if timings.first_token_s else None,
        total=duration(timings.total_s),
    )
