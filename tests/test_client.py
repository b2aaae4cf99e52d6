"""The public client, against a real server on a loopback port."""

import asyncio
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S
from scripted_engine import DONE, PNG, STATUS, WEIGHED, Daemon, ScriptedTicket, running

from iotd import errors
from iotd.client import Answer, AsyncClient, Classification, Client
from iotd.config import AskConfig, GrpcConfig
from iotd.events import Accepted, Draw, Format, Labels, Sampling
from iotd.rpc.request import REPLY_S, budget_for


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with running() as served:
        yield served


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with Client(daemon.target) as opened:
        yield opened


@pytest.fixture
def closed_port() -> int:
    """Nobody listens there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def reply(ticket: ScriptedTicket) -> None:
    ticket.say("Yes, ", "the door.")
    ticket.finish()


WHOLE = Answer("Yes, the door.", DONE.finish_reason, DONE.usage, DONE.timings)


def test_pieces_come_one_by_one_and_the_result_follows(daemon: Daemon, client: Client) -> None:
    stream = client.ask("Is a door open?")
    ticket = daemon.engine.next()
    pieces = iter(stream)
    ticket.say("Yes, ")
    assert next(pieces) == "Yes, "
    assert stream.accepted == Accepted("ask-0", 0)
    with pytest.raises(errors.Unavailable, match="has not ended"):
        _ = stream.result
    ticket.say("the door.")
    assert next(pieces) == "the door."
    ticket.finish()
    assert list(pieces) == []
    assert stream.done == DONE
    assert stream.result == WHOLE


def test_thoughts_stand_beside_the_answer(daemon: Daemon, client: Client) -> None:
    """They are told as they come, and are no pieces of it."""
    told: list[str] = []
    stream = client.ask("Is a door open?", thinking=True)
    stream.on_thought = told.append
    ticket = daemon.engine.next()
    ticket.think("Let me ", "see.")
    reply(ticket)
    assert "".join(stream) == "Yes, the door."
    assert "".join(told) == "Let me see."
    assert stream.thoughts == "Let me see."
    assert stream.result == replace(WHOLE, thoughts="Let me see.")


def test_answer_waits_for_the_whole(daemon: Daemon, client: Client) -> None:
    daemon.engine.script = reply
    assert client.answer("Is a door open?") == WHOLE


def test_every_option_reaches_the_engine(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    image = tmp_path / "porch.png"
    image.write_bytes(PNG)
    _stream = client.ask(
        "Who is there?",
        images=[PNG, image, str(image)],
        camera="porch",
        budget_s=3.0,
        use_context=False,
        temperature=0.0,
        top_p=0.5,
        top_k=0,
        presence_penalty=-1.0,
        seed=7,
        max_tokens=9,
        stop=["\n"],
        thinking=True,
    )
    ask = daemon.engine.next().ask
    assert len(ask.images) == 3
    assert (ask.question, ask.camera, ask.use_context) == ("Who is there?", "porch", False)
    assert ask.sampling == Sampling(0.0, 0.5, 0, -1.0, 7, 9, ("\n",), True, Draw(0.0, 0.5, 0, -1.0))
    assert ask.deadline_s - ask.arrived_s == pytest.approx(3.0 - REPLY_S)


def test_options_left_out_or_none_are_the_servers(daemon: Daemon, client: Client) -> None:
    _stream = client.ask("Is a door open?", temperature=None, camera=None, budget_s=None)
    ask = daemon.engine.next().ask
    assert ask.sampling == Sampling()
    assert (ask.camera, ask.use_context) == (None, True)
    assert ask.deadline_s - ask.arrived_s == pytest.approx(AskConfig().budget_s - REPLY_S)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"json_schema": {"type": "integer"}}, Format("json_schema", ('{"type": "integer"}',))),
        ({"json_schema": '{"type":"integer"}'}, Format("json_schema", ('{"type":"integer"}',))),
        ({"regex": "[ab]"}, Format("regex", ("[ab]",))),
        ({"choices": ("yes", "no")}, Format("choices", ("yes", "no"))),
    ],
)
def test_a_format_reaches_the_engine(daemon: Daemon, client: Client, options: Any, expected: Format) -> None:
    _stream = client.ask("Is a door open?", **options)
    assert daemon.engine.next().ask.format == expected


@pytest.mark.parametrize("way", ["break", "with", "cancel"])
def test_leaving_the_stream_cancels_the_ask(daemon: Daemon, client: Client, way: str) -> None:
    stream = client.ask("Is a door open?")
    ticket = daemon.engine.next()
    ticket.say("Yes")
    match way:
        case "break":
            for _ in stream:
                break
        case "with":
            with stream:
                assert next(iter(stream)) == "Yes"
        case "cancel":
            stream.cancel()
            assert "".join(stream) in ("", "Yes")
    assert ticket.cancelled.wait(PATIENCE_S)


def score(ticket: ScriptedTicket) -> None:
    ticket.finish(replace(DONE, weighed=WEIGHED))


SCORED = Classification(
    {"yes": 0.75, "no": 0.125}, {"yes": -0.5, "no": -2.25}, 0.125, "ask-0", DONE.usage, DONE.timings
)


def test_classify_tells_how_probable_each_label_is(daemon: Daemon, client: Client) -> None:
    daemon.engine.script = score
    found = client.classify("Is a door open?", ["yes", "no"])
    assert found == SCORED
    assert found.best == "yes"
    assert replace(found, none_probability=0.8).best is None
    assert replace(found, none_probability=None).best == "yes"
    assert daemon.engine.next().ask.labels == Labels(("yes", "no"))


def test_every_option_of_a_classification_reaches_the_engine(daemon: Daemon, client: Client) -> None:
    daemon.engine.script = score
    client.classify(
        "Who is there?",
        ("yes", "no"),
        images=[PNG],
        camera="porch",
        budget_s=3.0,
        use_context=False,
        sensors=["* door"],
        none_of_these=True,
        temperature=0.5,
    )
    ask = daemon.engine.next().ask
    assert (len(ask.images), ask.camera, ask.use_context, ask.sensors) == (1, "porch", False, ("* door",))
    assert ask.labels == Labels(("yes", "no"), none_of_these=True, temperature=0.5)
    assert ask.deadline_s - ask.arrived_s == pytest.approx(3.0 - REPLY_S)
    client.classify("Who is there?", ["yes"], length_normalized=True, temperature=None)
    assert daemon.engine.next().ask.labels == Labels(("yes",), length_normalized=True)


def test_a_classification_raises_the_servers_error_and_names_a_missing_server(
    daemon: Daemon, client: Client, closed_port: int
) -> None:
    daemon.engine.refusal = errors.InvalidInput("labels[1] is empty", field="labels[1]")
    with pytest.raises(errors.InvalidInput, match="is empty") as caught:
        client.classify("Is a door open?", ["yes", "no"])
    assert caught.value.field == "labels[1]"
    with Client(f"127.0.0.1:{closed_port}") as nobody, pytest.raises(errors.Unavailable, match="start `iotd serve`"):
        nobody.classify("Is a door open?", ["yes"])
    with pytest.raises(errors.InvalidInput) as caught:
        client.classify("Is a door open?", ["\udcff"])
    assert caught.value.field == "labels"


def test_the_async_client_classifies(daemon: Daemon) -> None:
    async def talk() -> None:
        async with AsyncClient(daemon.target) as client:
            assert await client.classify("Is a door open?", ["yes", "no"]) == SCORED
            with pytest.raises(errors.InvalidInput, match="there is nothing to choose from"):
                await client.classify("Is a door open?", [])

    daemon.engine.script = score
    daemon.run(talk())


def test_status_is_the_daemons_own(client: Client) -> None:
    assert client.status() == STATUS


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidInput("no such thing", field="sampling.top_p"),
        errors.Overloaded("queue full", retry_after_s=2.5),
        errors.Unavailable("draining", retry_after_s=1.5),
        errors.DeadlineExceeded("too late"),
        errors.NotFound("no camera 'porch'"),
        errors.PackageError("no model"),
        errors.PermissionDenied("not you"),
        errors.Internal("sorry"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_servers_error_is_raised_as_it_was(daemon: Daemon, client: Client, error: errors.IotdError) -> None:
    daemon.engine.refusal = error
    with pytest.raises(type(error)) as caught:
        client.answer("Is a door open?")
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    assert vars(caught.value) == vars(error)


def test_a_refusal_for_want_of_time_says_the_budget_that_would_do(daemon: Daemon, client: Client) -> None:
    daemon.engine.refusal = errors.Overloaded("too soon", retry_after_s=1.0, needed_s=2.0)
    with pytest.raises(errors.Overloaded) as refusal:
        client.answer("why?", budget_s=1)
    assert refusal.value.needed_s == pytest.approx(budget_for(2.0))


def test_a_context_overflow_is_an_invalid_question(daemon: Daemon, client: Client) -> None:
    daemon.engine.refusal = errors.ContextOverflow(900, 100)
    with pytest.raises(errors.InvalidInput, match="needs 900 tokens") as caught:
        client.answer("Is a door open?")
    assert caught.value.field == "question"


def test_a_connection_refused_names_the_target_and_what_to_do(closed_port: int) -> None:
    with Client(f"127.0.0.1:{closed_port}") as client:
        for call in (client.status, lambda: client.answer("Is a door open?")):
            with pytest.raises(errors.Unavailable, match=f"127.0.0.1:{closed_port}: start `iotd serve`"):
                call()


def test_a_server_that_does_not_answer_is_a_deadline_exceeded() -> None:
    """A listener that never accepts: the connection stands, and nothing comes."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        with Client(target) as client, pytest.raises(errors.DeadlineExceeded, match=target):
            client.status(timeout_s=0.2)


def test_a_request_too_large_for_the_server_says_so() -> None:
    too_large = pytest.raises(errors.InvalidInput, match="smaller images")
    config = GrpcConfig(listen="127.0.0.1:0", max_message_bytes=1000)
    with running(config) as daemon, Client(daemon.target) as client, too_large:
        client.answer("What is this?", images=[b"x" * 2000])


def test_a_missing_image_is_told_before_the_call(client: Client) -> None:
    with pytest.raises(errors.InvalidInput, match=r"/nowhere/porch\.png cannot be read: No such file"):
        client.ask("What is this?", images=["/nowhere/porch.png"])


def test_one_client_serves_twenty_threads(daemon: Daemon, client: Client) -> None:
    def echo(ticket: ScriptedTicket) -> None:
        ticket.say(*ticket.ask.question)
        ticket.finish()

    daemon.engine.script = echo
    with ThreadPoolExecutor(20) as pool:
        answers = pool.map(lambda number: client.answer(f"thread {number}").text, range(20))
    assert list(answers) == [f"thread {number}" for number in range(20)]


def test_the_async_client_streams_answers_and_tells_the_status(daemon: Daemon) -> None:
    async def talk() -> None:
        async with AsyncClient(daemon.target) as client:
            stream = client.ask("Is a door open?")
            assert [piece async for piece in stream] in (["Yes, ", "the door."], ["Yes, the door."])
            assert stream.result == WHOLE
            answers = await asyncio.gather(*(client.answer("Is a door open?") for _ in range(5)))
            assert answers == [WHOLE] * 5
            assert await client.status() == STATUS

    daemon.engine.script = reply
    daemon.run(talk())


@pytest.mark.parametrize("way", ["with", "cancel", "task"])
def test_leaving_an_async_stream_cancels_the_ask(daemon: Daemon, way: str) -> None:
    async def read(client: AsyncClient) -> None:
        async with client.ask("Is a door open?") as stream:
            async for piece in stream:
                assert piece == "Yes"
                match way:
                    case "with":
                        break
                    case "cancel":
                        stream.cancel()
                    case "task":
                        raise asyncio.CancelledError

    async def talk() -> None:
        async with AsyncClient(daemon.target) as client:
            outcome = await asyncio.gather(read(client), return_exceptions=True)
            assert outcome == [None] or way == "task"
            assert await asyncio.to_thread(ticket().cancelled.wait, PATIENCE_S)

    tickets: list[ScriptedTicket] = []

    def ticket() -> ScriptedTicket:
        return tickets[0]

    def say_yes(asked: ScriptedTicket) -> None:
        tickets.append(asked)
        asked.say("Yes")

    daemon.engine.script = say_yes
    daemon.run(talk())


def test_the_async_client_raises_the_servers_error_and_names_a_missing_server(daemon: Daemon, closed_port: int) -> None:
    async def talk() -> None:
        async with AsyncClient(daemon.target) as client:
            with pytest.raises(errors.NotFound, match="no camera"):
                await client.answer("Who is there?", camera="porch")
        async with AsyncClient(f"127.0.0.1:{closed_port}") as client:
            with pytest.raises(errors.Unavailable, match="start `iotd serve`"):
                await client.status()

    daemon.engine.refusal = errors.NotFound("no camera 'porch'")
    daemon.run(talk())


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("options", "field"),
    [({"key_file": "k"}, "cert_file"), ({"cert_file": "c"}, "key_file"), ({"target": "localhost"}, "target"),
     ({"target": ""}, "target"), ({"target": "http://pi:50551"}, "target")],
)  # fmt: skip
def test_what_grpc_cannot_connect_with_is_refused_at_once(
    kind: type[Client | AsyncClient], options: dict[str, str], field: str
) -> None:
    with pytest.raises(errors.InvalidInput) as caught:
        kind(**options)  # type: ignore[arg-type] # texts, all of them
    assert caught.value.field == field


def test_files_that_are_no_pem_never_reach_grpc(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("nonsense")
    for options in ({"ca_file": tmp_path / "a"}, {"cert_file": tmp_path / "a", "key_file": tmp_path / "a"}):
        with pytest.raises(errors.InvalidInput, match="PEM"):
            Client(**options)


def test_a_budget_beyond_what_grpc_counts_is_no_deadline_that_has_passed(daemon: Daemon, client: Client) -> None:
    daemon.engine.script = reply
    assert client.answer("Is a door open?", budget_s=1e12) == WHOLE


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_tokens": 99_999_999_999}, "sampling.max_tokens"),
        ({"seed": 10**20}, "sampling.seed"),
        ({"stop": ["\udcff"]}, "sampling.stop"),
        ({"camera": "\udcff"}, "camera"),
        ({"question": "\udcff"}, "question"),
        ({"budget_s": 1e300}, "budget"),
        ({"budget_s": float("nan")}, "budget"),
        ({"json_schema": {"const": {1}}}, "json_schema"),
        ({"regex": "\udcff"}, "regex"),
        ({"choices": [1]}, "choices"),
        ({"choices": ["a"], "regex": "a"}, "format"),
    ],
)
def test_what_the_proto_cannot_carry_is_refused_by_its_field(
    client: Client, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(errors.InvalidInput) as caught:
        client.ask(**{"question": "why?", **options})
    assert caught.value.field == field
