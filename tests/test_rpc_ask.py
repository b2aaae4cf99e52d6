"""Ask over a real loopback gRPC connection."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from patience import PATIENCE_S
from scripted_engine import DONE, PNG, Daemon, ScriptedTicket, channel, decode_image, running

from iotd.config import AskConfig
from iotd.errors import DeadlineExceeded
from iotd.events import Done, Draw, FinishReason, Format, Sampling, Timings, Usage
from iotd.rpc import service
from iotd.rpc.request import REPLY_MARGIN_S, budget_for, deadline_s
from iotd.rpc.times import duration
from iotd.v1 import iotd_pb2, iotd_pb2_grpc


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with running(
        ask=AskConfig(budget_s=20, max_budget_s=60, max_tokens=99, temperature=0.3, presence_penalty=0.5, max_images=2)
    ) as served:
        yield served


@pytest.fixture
def stub(daemon: Daemon) -> Iterator[Any]:
    with channel(daemon) as opened:
        yield iotd_pb2_grpc.IotdStub(opened)


def question(**fields: Any) -> iotd_pb2.AskRequest:
    return iotd_pb2.AskRequest(**{"question": "Is a door open?", **fields})


def test_an_answer_is_accepted_then_deltas_then_done(daemon: Daemon, stub: Any) -> None:
    events = stub.Ask(question())
    ticket = daemon.engine.next()
    accepted = next(events)
    ticket.say("Yes, ")
    first = next(events)
    ticket.say("the front door.")
    second = next(events)
    ticket.finish()
    done = next(events)

    assert (accepted.accepted.request_id, accepted.accepted.queue_position) == ("ask-0", 0)
    assert [first.delta.text, second.delta.text] == ["Yes, ", "the front door."]
    assert done.done == iotd_pb2.AskDone(
        finish_reason=iotd_pb2.FINISH_REASON_STOP,
        usage=iotd_pb2.Usage(context_tokens=100, prompt_tokens=12, image_tokens=4, generation_tokens=2),
        timings=iotd_pb2.Timings(
            queue=duration(0.25),
            image=duration(0.5),
            prefill=duration(0.125),
            decode=duration(1.5),
            first_token=duration(0.875),
            total=duration(2.5),
        ),
    )
    assert list(events) == []


@pytest.mark.parametrize("reason", FinishReason)
def test_every_finish_reason_has_its_number(daemon: Daemon, stub: Any, reason: FinishReason) -> None:
    events = stub.Ask(question())
    daemon.engine.next().finish(Done(reason, Usage(), Timings()))
    done = list(events)[-1].done
    assert iotd_pb2.FinishReason.Name(done.finish_reason) == f"FINISH_REASON_{reason.name}"
    assert not done.timings.HasField("first_token")


def test_unset_fields_take_the_defaults(daemon: Daemon, stub: Any) -> None:
    _call = stub.Ask(question())
    ask = daemon.engine.next().ask
    assert ask.question == "Is a door open?"
    assert ask.images == ()
    assert ask.camera is None
    assert ask.use_context is True
    assert ask.sampling == Sampling(max_tokens=99, temperature=0.3, presence_penalty=0.5)


@pytest.mark.parametrize(
    ("fields", "given", "thoughts"),
    [
        ({}, {}, Draw(1.0, 0.95, 20, 1.5)),
        ({"camera": "porch"}, {}, Draw(0.6, 0.95, 20, 0.0)),
        ({"images": [PNG]}, {}, Draw(0.6, 0.95, 20, 0.0)),
        ({}, {"temperature": 0, "presence_penalty": 0.25}, Draw(0.0, 0.95, 20, 0.25)),
    ],
)
def test_thoughts_are_drawn_by_the_models_card_where_the_request_does_not_say_how(
    daemon: Daemon, stub: Any, fields: Any, given: dict[str, float], thoughts: Draw
) -> None:
    """The answer behind them is drawn as every other."""
    sampling = iotd_pb2.SamplingOptions(thinking=True, **given)
    _call = stub.Ask(question(sampling=sampling, **fields))
    ask = daemon.engine.next().ask
    _other = stub.Ask(question(sampling=iotd_pb2.SamplingOptions(**given), **fields))
    other = daemon.engine.next().ask
    assert ask.sampling.thoughts == thoughts
    assert replace(ask.sampling, thoughts=None, thinking=False) == other.sampling


def test_a_session_goes_both_ways(daemon: Daemon, stub: Any) -> None:
    _call = stub.Ask(question(session="abc", keep_session=True, catch_up=True))
    ask = daemon.engine.next().ask
    assert (ask.session, ask.keep_session, ask.catch_up) == ("abc", True, True)
    events = stub.Ask(question(keep_session=True))
    daemon.engine.next().finish(Done(FinishReason.STOP, Usage(), Timings(), "def"))
    assert list(events)[-1].done.session == "def"


def test_catching_up_without_a_session_is_refused(stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Ask(question(catch_up=True)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_every_field_reaches_the_engine_zeros_too(daemon: Daemon, stub: Any) -> None:
    sampling = iotd_pb2.SamplingOptions(
        temperature=0, top_p=1, top_k=0, presence_penalty=0, seed=0, max_tokens=5, stop=["\n", "."], thinking=True
    )
    _call = stub.Ask(question(images=[PNG, PNG], camera="porch", use_context=False, sampling=sampling))
    ask = daemon.engine.next().ask
    assert ask.camera == "porch"
    assert ask.use_context is False
    assert ask.sampling == Sampling(0.0, 1.0, 0, 0.0, 0, 5, ("\n", "."), True, Draw(0.0, 1.0, 0, 0.0))
    assert len(ask.images) == 2
    np.testing.assert_array_equal(ask.images[0], decode_image(PNG))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"json_schema": '{"type": "integer"}'}, Format("json_schema", ('{"type": "integer"}',))),
        ({"regex": "[ab]+"}, Format("regex", ("[ab]+",))),
        ({"choices": iotd_pb2.Choices(choices=["yes", "no"])}, Format("choices", ("yes", "no"))),
    ],
)
def test_a_format_reaches_the_engine(daemon: Daemon, stub: Any, fields: Any, expected: Format | None) -> None:
    _call = stub.Ask(question(**fields))
    assert daemon.engine.next().ask.format == expected


@pytest.mark.parametrize(
    ("budget_s", "timeout_s", "expected_s"),
    [
        (None, None, 20.0),
        (2.0, None, 2.0),
        (600.0, None, 60.0),
        (10.0, 5.0, 5.0 - REPLY_MARGIN_S),
        (5.0, 10.0, 5.0),
        (None, 8.0, 8.0 - REPLY_MARGIN_S),
    ],
    ids=["default", "budget", "capped", "gRPC is sooner", "budget is sooner", "gRPC before default"],
)
def test_the_deadline_is_the_soonest_of_budget_grpc_deadline_and_maximum(
    daemon: Daemon, stub: Any, budget_s: float | None, timeout_s: float | None, expected_s: float
) -> None:
    before_s = time.monotonic()
    _call = stub.Ask(question(budget=duration(budget_s) if budget_s else None), timeout=timeout_s)
    ask = daemon.engine.next().ask
    after_s = time.monotonic()
    assert before_s <= ask.arrived_s <= after_s
    # gRPC carries a timeout in whole milliseconds, and counts it from the moment of the call. It is looked at behind
    # the arrival: where a busy machine stalls in between, the deadline is so much sooner.
    assert before_s - 1.0 <= ask.deadline_s - expected_s <= after_s + 0.01


def test_cancelling_the_call_cancels_the_ticket(daemon: Daemon, stub: Any) -> None:
    events = stub.Ask(question())
    ticket = daemon.engine.next()
    ticket.say("Yes")
    next(events)
    assert not ticket.cancelled.is_set()
    events.cancel()
    assert ticket.cancelled.wait(PATIENCE_S)
    ticket.say("nobody hears this")
    ticket.finish()


def test_a_client_that_goes_away_cancels_its_ticket(daemon: Daemon) -> None:
    with channel(daemon) as opened:
        _call = iotd_pb2_grpc.IotdStub(opened).Ask(question())
        ticket = daemon.engine.next()
    assert ticket.cancelled.wait(PATIENCE_S)


def test_a_passed_grpc_deadline_cancels_the_ticket(daemon: Daemon, stub: Any) -> None:
    events = stub.Ask(question(), timeout=1.0)
    ticket = daemon.engine.next()
    with pytest.raises(grpc.RpcError) as caught:
        list(events)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert ticket.cancelled.wait(PATIENCE_S)


def test_a_client_that_does_not_read_blocks_no_engine_and_leaves_nothing_when_it_goes(daemon: Daemon) -> None:
    with channel(daemon) as opened:
        _call = iotd_pb2_grpc.IotdStub(opened).Ask(question())
        ticket = daemon.engine.next()
        for _ in range(100):
            ticket.say("x" * 100_000)
        ticket.finish()
        assert not ticket.cancelled.is_set()
    assert ticket.cancelled.wait(PATIENCE_S)


def test_a_client_that_reads_late_gets_the_whole_answer(daemon: Daemon, stub: Any) -> None:
    answer = stub.Ask(question())
    ticket = daemon.engine.next()
    ticket.say(*["x" * 10_000] * 1_000)
    ticket.finish()
    assert sum(len(event.delta.text) for event in answer) == 10_000_000


def test_an_engine_that_never_ends_an_answer_does_not_hold_the_call(
    daemon: Daemon, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "STUCK_S", 0.05)
    answer = stub.Ask(question(budget=duration(0.05)))
    ticket = daemon.engine.next()
    with pytest.raises(grpc.RpcError) as caught:
        list(answer)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert ticket.cancelled.wait(PATIENCE_S)


def test_twenty_clients_at_once_each_get_their_own_answer(daemon: Daemon) -> None:
    def echo(ticket: ScriptedTicket) -> None:
        ticket.say(*ticket.ask.question)
        ticket.finish()

    def client(number: int) -> str:
        with channel(daemon) as opened:
            events = iotd_pb2_grpc.IotdStub(opened).Ask(question(question=f"client {number} " * 20))
            return "".join(event.delta.text for event in events)

    daemon.engine.script = echo
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(client, range(20)))
    assert answers == [f"client {number} " * 20 for number in range(20)]


def test_one_call_too_many_is_refused(daemon: Daemon, stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_OPEN_ASKS", 1)
    first = stub.Ask(question())
    ticket = daemon.engine.next()
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Ask(question()))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    ticket.finish()
    assert list(first)[-1].HasField("done")


def test_images_are_decoded_off_the_event_loop() -> None:
    """Status is answered while an image is being decoded."""
    decoding, go_on = threading.Event(), threading.Event()

    def slow(data: bytes) -> Any:
        decoding.set()
        assert go_on.wait(PATIENCE_S)
        return decode_image(data)

    with running(decode=slow) as daemon, channel(daemon) as opened:
        stub = iotd_pb2_grpc.IotdStub(opened)
        events = stub.Ask(question(images=[PNG]))
        assert decoding.wait(PATIENCE_S)
        assert stub.GetStatus(iotd_pb2.GetStatusRequest(), timeout=PATIENCE_S).version == "1.2.3"
        go_on.set()
        daemon.engine.next().finish()
        assert list(events)[-1].done.finish_reason == iotd_pb2.FINISH_REASON_STOP


def test_an_answer_without_text_is_accepted_and_done(daemon: Daemon, stub: Any) -> None:
    events = stub.Ask(question())
    ticket = daemon.engine.next()
    ticket.say("")
    ticket.finish(DONE)
    assert [event.WhichOneof("event") for event in events] == ["accepted", "done"]


def test_a_deadline_of_the_call_is_not_called_the_budget(daemon: Daemon, stub: Any) -> None:
    answer = stub.Ask(question(budget=duration(10)), timeout=5)
    daemon.engine.next().fail(DeadlineExceeded("the budget of 4.98 s ended in the queue"))
    with pytest.raises(grpc.RpcError, match="the call's own deadline of"):
        list(answer)


def test_too_many_images_are_told_once(daemon: Daemon, stub: Any) -> None:
    with pytest.raises(grpc.RpcError, match="images: 3 given, at most 2 taken"):
        list(stub.Ask(question(images=[PNG] * 3)))


@pytest.mark.parametrize("needed_s", [0.004, 0.03, 0.036, 0.05, 2.0])
def test_a_refused_ask_is_told_the_budget_of_which_enough_is_left(needed_s: float) -> None:
    request = question(budget=duration(budget_for(needed_s)))
    assert deadline_s(request, 0.0, None, AskConfig()) == pytest.approx(needed_s, abs=1e-6)
