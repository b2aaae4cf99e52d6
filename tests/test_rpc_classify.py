"""Classify over a real loopback gRPC connection: what Ask does, with scores in place of an answer."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from patience import PATIENCE_S
from scripted_engine import DONE, PNG, WEIGHED, Daemon, ScriptedTicket, channel, decode_image, running

from iotd.config import AskConfig
from iotd.errors import DeadlineExceeded
from iotd.events import Labels, LabelScore, Weighed
from iotd.rpc import service
from iotd.rpc.request import REPLY_S
from iotd.rpc.times import duration
from iotd.v1 import iotd_pb2, iotd_pb2_grpc


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with running(ask=AskConfig(budget_s=20, max_budget_s=60)) as served:
        yield served


@pytest.fixture
def stub(daemon: Daemon) -> Iterator[Any]:
    with channel(daemon) as opened:
        yield iotd_pb2_grpc.IotdStub(opened)


def request(**fields: Any) -> iotd_pb2.ClassifyRequest:
    return iotd_pb2.ClassifyRequest(**{"question": "Is a door open?", "labels": ["yes", "no"], **fields})


def code(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call.result()
    return caught.value.code()


@pytest.mark.parametrize("none_probability", [None, 0.0, 0.125])
def test_scores_come_in_one_message(daemon: Daemon, stub: Any, none_probability: float | None) -> None:
    call = stub.Classify.future(request())
    daemon.engine.next().finish(replace(DONE, weighed=replace(WEIGHED, none_probability=none_probability)))
    assert call.result() == iotd_pb2.ClassifyResponse(
        labels=[
            iotd_pb2.LabelProbability(label="yes", probability=0.75, log_probability=-0.5),
            iotd_pb2.LabelProbability(label="no", probability=0.125, log_probability=-2.25),
        ],
        none_probability=none_probability,
        request_id="ask-0",
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


def test_unset_fields_take_the_defaults(daemon: Daemon, stub: Any) -> None:
    before_s = time.monotonic()
    _call = stub.Classify.future(request())
    ask = daemon.engine.next().ask
    assert (ask.question, ask.images, ask.camera, ask.use_context) == ("Is a door open?", (), None, True)
    assert ask.labels == Labels(("yes", "no"))
    assert (ask.session, ask.keep_session, ask.format) == (None, False, None)
    assert (ask.sampling.max_tokens, ask.sampling.thinking) == (1, False)
    assert before_s + 20 - REPLY_S <= ask.deadline_s <= time.monotonic() + 20


def test_every_field_reaches_the_engine(daemon: Daemon, stub: Any) -> None:
    fields = {"images": [PNG], "camera": "porch", "use_context": False, "sensors": ["* door"], "budget": duration(3)}
    _call = stub.Classify.future(request(**fields, none_of_these=True, temperature=2.5))
    ask = daemon.engine.next().ask
    assert (ask.camera, ask.use_context, ask.exact_readings, ask.sensors) == ("porch", False, True, ("* door",))
    assert ask.labels == Labels(("yes", "no"), none_of_these=True, temperature=2.5)
    assert ask.deadline_s - ask.arrived_s == pytest.approx(3 - REPLY_S)
    np.testing.assert_array_equal(ask.images[0], decode_image(PNG))
    _call = stub.Classify.future(request(length_normalized=True, exact_readings=True))
    ask = daemon.engine.next().ask
    assert ask.exact_readings
    assert ask.labels == Labels(("yes", "no"), length_normalized=True)


@pytest.mark.parametrize("way", ["cancel", "leave", "deadline"])
def test_a_client_that_goes_away_cancels_its_ticket(daemon: Daemon, way: str) -> None:
    with channel(daemon) as opened:
        timeout_s = 0.5 if way == "deadline" else None
        call = iotd_pb2_grpc.IotdStub(opened).Classify.future(request(), timeout=timeout_s)
        ticket = daemon.engine.next()
        assert not ticket.cancelled.is_set() or way == "deadline"
        if way == "cancel":
            call.cancel()
        if way == "deadline":
            assert code(call) is grpc.StatusCode.DEADLINE_EXCEEDED
        if way != "leave":
            assert ticket.cancelled.wait(PATIENCE_S)
    assert ticket.cancelled.wait(PATIENCE_S)


def test_an_error_of_the_engine_ends_the_call(daemon: Daemon, stub: Any) -> None:
    call = stub.Classify.future(request(budget=duration(1)))
    daemon.engine.next().fail(DeadlineExceeded("the budget of 1 s ended in the queue"))
    assert code(call) is grpc.StatusCode.DEADLINE_EXCEEDED


def test_it_counts_among_the_open_questions(daemon: Daemon, stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_OPEN_ASKS", 1)
    first = stub.Classify.future(request())
    ticket = daemon.engine.next()
    assert code(stub.Classify.future(request())) is grpc.StatusCode.RESOURCE_EXHAUSTED
    ticket.finish(replace(DONE, weighed=WEIGHED))
    assert len(first.result().labels) == 2
    _call = stub.Classify.future(request())
    assert daemon.engine.next().accepted.request_id == "ask-1"


def test_a_daemon_that_stops_ends_it_and_takes_no_more(daemon: Daemon, stub: Any) -> None:
    call = stub.Classify.future(request())
    ticket = daemon.engine.next()
    daemon.set_serving(False)
    assert code(stub.Classify.future(request())) is grpc.StatusCode.UNAVAILABLE
    daemon.run(daemon.server._service.drain(0.0))
    assert code(call) is grpc.StatusCode.UNAVAILABLE
    assert ticket.cancelled.wait(PATIENCE_S)


def test_twenty_clients_at_once_each_get_their_own_scores(daemon: Daemon) -> None:
    def score(ticket: ScriptedTicket) -> None:
        assert ticket.ask.labels is not None
        (label,) = ticket.ask.labels.texts
        ticket.finish(replace(DONE, weighed=Weighed((LabelScore(label, 1.0, -1.0),))))

    def client(number: int) -> str:
        with channel(daemon) as opened:
            response = iotd_pb2_grpc.IotdStub(opened).Classify(request(labels=[f"label {number}"]))
            return str(response.labels[0].label)

    daemon.engine.script = score
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(client, range(20))) == [f"label {number}" for number in range(20)]
