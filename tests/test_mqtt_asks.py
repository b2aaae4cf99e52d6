"""Questions over a real broker to an engine whose every step the test decides."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import paho.mqtt.client as paho
import pytest
from broker import RETRY_S, Asker, Listen, MakeMosquitto, until
from patience import PATIENCE_S
from scripted_engine import DONE, PNG, Daemon, running

from iotd.config import AskConfig, MqttConfig, SubscriptionConfig
from iotd.demo.broker import Amqtt, Mosquitto
from iotd.errors import InvalidInput, NotFound, Overloaded
from iotd.events import RGB, Done, FinishReason, Observation, Timings, Usage
from iotd.mqtt import Link, asks

pytest_plugins = ("broker",)

BASE = "iotd/n"
ANSWERED = {
    "finishReason": "stop",
    "usage": {"contextTokens": 100, "promptTokens": 12, "imageTokens": 4, "generationTokens": 2},
    "timings": {
        "queue": "0.250s",
        "image": "0.500s",
        "prefill": "0.125s",
        "decode": "1.500s",
        "firstToken": "0.875s",
        "total": "2.500s",
    },
    "requestId": "ask-0",
}
"""What is told of DONE."""

MakeLink = Callable[..., Link]
"""(port, **MqttConfig's fields) → a link that is connected, and stopped at the end of the test."""


def decode(data: bytes) -> RGB:
    if data != PNG:
        raise InvalidInput("neither a JPEG nor a PNG")
    return np.full((2, 3, 3), 7, np.uint8)


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with running(ask=AskConfig(budget_s=20, max_budget_s=60, max_images=2), decode=decode) as served:
        yield served


@pytest.fixture
def make_link(daemon: Daemon) -> Iterator[MakeLink]:
    with ExitStack() as stack:

        def make(port: int, sink: Callable[[Observation], None] = print, **config: Any) -> Link:
            async def on_the_loop() -> Link:
                settings = MqttConfig(host="127.0.0.1", port=port, node="n", **config)
                return Link(settings, sink, answerer=daemon.server.service, retry_s=RETRY_S)

            link: Link = daemon.run(on_the_loop())
            link.start()
            stack.callback(link.stop)
            assert link.wait_connected(PATIENCE_S)
            return link

        yield make


@pytest.fixture
def link(mosquitto: Mosquitto, make_link: MakeLink) -> Link:
    return make_link(mosquitto.port)


@pytest.fixture
def asker(mosquitto: Mosquitto) -> Iterator[Asker]:
    with Asker(mosquitto.port, BASE) as client:
        yield client


def counted(link: Link) -> dict[str, int]:
    counters = link.status().counters
    return {name: counters[name] for name in ("asks", "asks_retained", "answers", "answers_dropped")}


def test_a_plain_question_is_answered(daemon: Daemon, link: Link, asker: Asker) -> None:
    asker.ask("Is a door open?")
    ticket = daemon.engine.next()
    assert ticket.ask.question == "Is a door open?"
    assert ticket.ask.deadline_s - ticket.ask.arrived_s == pytest.approx(20)
    ticket.say("Yes, the ", "Tür.")
    ticket.finish()
    message = asker.next_message()
    assert (message.topic, message.retain) == (f"{BASE}/answer", False)
    assert "Tür" in message.payload.decode()
    asker.ask("And now?")
    daemon.engine.next().finish()
    assert asker.next()["data"]["text"] == ""
    until(lambda: counted(link) == {"asks": 2, "asks_retained": 0, "answers": 2, "answers_dropped": 0})


def test_an_answer_is_told_as_the_interface_has_it(daemon: Daemon, link: Link, asker: Asker) -> None:
    asker.ask({"question": "Is a door open?", "transaction": 7})
    ticket = daemon.engine.next()
    ticket.say("Yes.")
    ticket.finish()
    assert asker.next() == {"status": "ok", "data": {"text": "Yes.", **ANSWERED}, "transaction": 7}


def test_a_session_is_told_where_it_is_kept(daemon: Daemon, link: Link, asker: Asker) -> None:
    asker.ask({"question": "a", "keepSession": True})
    ticket = daemon.engine.next()
    assert ticket.ask.keep_session
    ticket.finish(Done(FinishReason.BUDGET, Usage(), Timings(), "abc"))
    data = asker.next()["data"]
    assert (data["session"], data["finishReason"]) == ("abc", "budget")


def test_json_reaches_the_engine_with_its_images(daemon: Daemon, link: Link, asker: Asker) -> None:
    image = "Z29vZCBpbWFnZQ=="  # PNG in base64
    asker.ask({"question": "a", "images": [image], "budget": "5s", "sampling": {"maxTokens": 3}, "regex": "[ab]+"})
    ask = daemon.engine.next().ask
    assert (ask.question, ask.sampling.max_tokens, len(ask.images)) == ("a", 3, 1)
    assert ask.format is not None
    assert ask.deadline_s - ask.arrived_s == pytest.approx(5)


def test_the_answer_goes_where_the_question_says(daemon: Daemon, link: Link, asker: Asker) -> None:
    asker.ask("a", ResponseTopic="replies/me", CorrelationData=b"\x00\xff8")
    daemon.engine.next().finish()
    message = asker.next_message()
    assert (message.topic, message.properties.CorrelationData) == ("replies/me", b"\x00\xff8")


@pytest.mark.parametrize(
    ("budget", "expiry_s", "expected_s"),
    [("60s", 1, 1), ("2s", 30, 2), (None, 3, 3), (None, 30, 20), ("600s", None, 60)],
    ids=["expiry", "budget", "expiry before default", "default", "maximum"],
)
def test_the_deadline_is_the_soonest_of_budget_expiry_and_maximum(
    daemon: Daemon, link: Link, asker: Asker, budget: str | None, expiry_s: int | None, expected_s: float
) -> None:
    before_s = time.monotonic()
    expiry = {} if expiry_s is None else {"MessageExpiryInterval": expiry_s}
    asker.ask({"question": "a"} | ({} if budget is None else {"budget": budget}), **expiry)
    ticket = daemon.engine.next()
    assert before_s <= ticket.ask.arrived_s <= time.monotonic()
    assert ticket.ask.deadline_s - ticket.ask.arrived_s == pytest.approx(expected_s)
    ticket.finish()


def test_a_retained_question_is_ignored_and_counted(
    daemon: Daemon, mosquitto: Mosquitto, make_link: MakeLink, asker: Asker
) -> None:
    asker.ask("of yesterday", retain=True)
    link = make_link(mosquitto.port)
    asker.ask("of today")
    ticket = daemon.engine.next()
    assert ticket.ask.question == "of today"
    assert counted(link) == {"asks": 1, "asks_retained": 1, "answers": 0, "answers_dropped": 0}
    ticket.finish()


@pytest.mark.parametrize(
    ("question", "code", "field"),
    [
        ("", "INVALID_ARGUMENT", "question"),
        (b"\xff", "INVALID_ARGUMENT", "question"),
        ('{"question": ', "INVALID_ARGUMENT", None),
        ({"question": "a", "colour": 1}, "INVALID_ARGUMENT", "colour"),
        ({"question": "a", "\ud800": 1}, "INVALID_ARGUMENT", "\ud800"),
        ({"question": "a", "budget": "0s"}, "INVALID_ARGUMENT", "budget"),
        ({"question": "a", "stream": 1}, "INVALID_ARGUMENT", "stream"),
        ({"question": "a", "catchUp": True}, "INVALID_ARGUMENT", "catchUp"),
        ({"question": "a", "sampling": {"maxTokens": 0}}, "INVALID_ARGUMENT", "sampling.maxTokens"),
        ({"question": "a", "images": ["AAAA"]}, "INVALID_ARGUMENT", "images[0]"),
        ({"question": "a", "regex": "("}, "INVALID_ARGUMENT", "regex"),
        ("x" * 2000, "INVALID_ARGUMENT", None),
    ],
)
def test_what_cannot_be_asked_is_answered_with_the_field_at_fault(
    mosquitto: Mosquitto, make_link: MakeLink, asker: Asker, question: Any, code: str, field: str | None
) -> None:
    make_link(mosquitto.port, max_payload_bytes=1024)
    asker.ask(question)
    told = asker.next()
    assert told["status"] == "error"
    assert (told["error"]["code"], told["error"].get("field")) == (code, field)
    assert told["error"]["message"]


def test_the_engines_errors_are_told_with_what_helps(daemon: Daemon, link: Link, asker: Asker) -> None:
    daemon.engine.refusal = Overloaded("no answer fits", retry_after_s=1.5, needed_s=4)
    asker.ask({"question": "a", "transaction": "t"})
    error = {
        "code": "RESOURCE_EXHAUSTED",
        "reason": "OVERLOADED",
        "message": "no answer fits",
        "retryDelay": "1.5s",
        "metadata": {"neededSeconds": "4.000000"},
    }
    assert asker.next() == {"status": "error", "error": error, "transaction": "t"}
    daemon.engine.refusal = None
    asker.ask("b")
    daemon.engine.next().fail(NotFound("no such camera"))
    assert asker.next()["error"]["code"] == "NOT_FOUND"


def test_a_defect_is_logged_and_not_told(
    daemon: Daemon, link: Link, asker: Asker, caplog: pytest.LogCaptureFixture
) -> None:
    daemon.engine.refusal = ZeroDivisionError("the inside")
    asker.ask("a")
    error = asker.next()["error"]
    assert error["code"] == "INTERNAL"
    assert "inside" not in error["message"]
    assert "the inside" in caplog.text


def test_one_question_too_many_is_refused(
    daemon: Daemon, link: Link, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asks, "MAX_OPEN_ASKS", 1)
    asker.ask("first")
    first = daemon.engine.next()
    asker.ask({"question": "second", "transaction": 2})
    refused = asker.next()
    assert (refused["error"]["code"], refused["transaction"]) == ("RESOURCE_EXHAUSTED", 2)
    first.finish()
    assert asker.next()["status"] == "ok"
    until(lambda: counted(link)["answers"] == 2)
    asker.ask("third")
    daemon.engine.next().finish()
    assert asker.next()["status"] == "ok"


def test_pieces_are_sent_where_they_are_asked_for(daemon: Daemon, link: Link, asker: Asker) -> None:
    asker.ask({"question": "a", "stream": True, "transaction": 1}, ResponseTopic="replies/me", CorrelationData=b"c")
    ticket = daemon.engine.next()
    told = []
    for piece in ("Yes", ", the door."):
        ticket.say(piece)
        message = asker.next_message()
        assert (message.topic, message.properties.CorrelationData) == (f"{BASE}/answer/stream", b"c")
        told.append(message.payload.decode())
    assert told[0] == '{"text": "Yes", "requestId": "ask-0", "transaction": 1}'
    ticket.finish()
    message = asker.next_message()
    assert message.topic == "replies/me"
    assert '"text": "Yes, the door."' in message.payload.decode()


@pytest.mark.parametrize("make_broker", [Amqtt, Mosquitto])
def test_without_mqtt_5_the_transaction_tells_answers_apart(
    daemon: Daemon, make_link: MakeLink, make_broker: Any
) -> None:
    """amqtt knows 3.1.1 alone; mosquitto translates between the versions of two clients."""
    with make_broker() as broker:
        link = make_link(broker.port)
        with Asker(broker.port, BASE, protocol=paho.MQTTv311) as asker:
            asker.ask({"question": "a", "transaction": "mine"})
            daemon.engine.next().finish()
            message = asker.next_message()
        link.stop()
    assert message.topic == f"{BASE}/answer"
    assert '"transaction": "mine"' in message.payload.decode()


def test_an_answer_waits_for_the_broker_until_its_deadline(
    daemon: Daemon, mosquitto: Mosquitto, link: Link, asker: Asker
) -> None:
    asker.ask("in time")
    asker.ask({"question": "too late", "budget": "0.3s"})
    tickets = [daemon.engine.next() for _ in range(2)]
    mosquitto.kill()
    until(lambda: not link.status().connected)
    for ticket in tickets:
        ticket.finish()
    until(lambda: all(ticket.cancelled.is_set() for ticket in tickets))
    until(lambda: time.monotonic() > tickets[1].ask.deadline_s)
    mosquitto.start()
    until(lambda: counted(link) == {"asks": 2, "asks_retained": 0, "answers": 1, "answers_dropped": 1})


def test_questions_are_heard_again_after_a_lost_broker(daemon: Daemon, mosquitto: Mosquitto, link: Link) -> None:
    mosquitto.kill()
    until(lambda: not link.status().connected)
    mosquitto.start()
    assert link.wait_connected(PATIENCE_S)
    with Asker(mosquitto.port, BASE) as asker:
        asker.ask("a")
        daemon.engine.next().finish()
        assert asker.next()["status"] == "ok"


def test_a_topic_that_the_broker_refuses_costs_that_answer_only(
    daemon: Daemon, make_mosquitto: MakeMosquitto, make_link: MakeLink, tmp_path: Path
) -> None:
    rules = tmp_path / "acl"
    rules.write_text("topic readwrite iotd/#\n")
    broker = make_mosquitto(f"allow_anonymous true\nacl_file {rules}")
    link = make_link(broker.port)
    with Asker(broker.port, BASE) as asker:
        asker.ask("a", ResponseTopic="forbidden")
        daemon.engine.next().finish()
        until(lambda: counted(link)["answers_dropped"] == 1)
        asker.ask("b")
        daemon.engine.next().finish()
        assert asker.next()["status"] == "ok"


def test_a_stop_ends_open_questions_before_it_says_offline(
    daemon: Daemon, mosquitto: Mosquitto, link: Link, asker: Asker, listen: Listen
) -> None:
    watcher = listen(mosquitto.port, f"{BASE}/#")
    asker.ask("a")
    ticket = daemon.engine.next()
    daemon.run(daemon.server.stop(0))
    link.stop()
    heard = [watcher.next()]
    while heard[-1][1] != "offline":
        heard.append(watcher.next())
    errors = [text for topic, text, _ in heard if topic == f"{BASE}/answer"]
    assert len(errors) == 1
    assert '"code": "UNAVAILABLE"' in errors[0]
    assert ticket.cancelled.is_set()


def test_a_question_that_nothing_ends_is_cut_off_by_the_links_own_stop(
    daemon: Daemon, link: Link, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asks, "SETTLE_S", 0.0)
    asker.ask("a")
    ticket = daemon.engine.next()
    link.stop()
    assert asker.next()["error"]["code"] == "UNAVAILABLE"
    assert ticket.cancelled.wait(PATIENCE_S)


def test_a_daemon_that_drains_says_so(daemon: Daemon, link: Link, asker: Asker) -> None:
    daemon.set_serving(False)
    asker.ask("a")
    error = asker.next()["error"]
    assert (error["code"], error["retryDelay"]) == ("UNAVAILABLE", "5s")


def test_a_question_is_no_reading_whatever_else_is_subscribed(
    daemon: Daemon, mosquitto: Mosquitto, make_link: MakeLink, asker: Asker
) -> None:
    read: list[Observation] = []
    link = make_link(mosquitto.port, read.append, subscriptions=[SubscriptionConfig(topic=f"{BASE}/+")])
    asker.ask("a")
    daemon.engine.next().finish(DONE)
    assert asker.next()["status"] == "ok"
    until(lambda: counted(link)["answers"] == 1)
    assert daemon.engine.tickets.empty()
    assert not [event for event in read if "ask" in getattr(event, "source", "")]


def test_a_response_topic_with_wildcards_is_none(daemon: Daemon, link: Link, asker: Asker) -> None:
    """mosquitto lets one through; to publish there would be an error of the protocol."""
    asker.ask("a", ResponseTopic="replies/+")
    daemon.engine.next().finish()
    assert asker.next_message().topic == f"{BASE}/answer"
