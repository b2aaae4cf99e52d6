"""Whatever the interleaving of events, asks, cancels and swaps: the answers are those of the plain reading."""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from engine_driver import SYSTEM, DrivenEngine, Sink, frame, reading
from fake_model import CONTROLS, FakeModel, FakeState
from hypothesis import example, given, settings
from hypothesis import strategies as st

from iotd.engine import Ticket
from iotd.engine.context import SLACK_TOKENS
from iotd.errors import NotFound
from iotd.events import Done, FinishReason

OPENING = f"<system>{SYSTEM}<end><user>"
SESSIONS = {"session_bytes": 2 * (256 + SLACK_TOKENS + 256) * 8}
"""Room for two of them."""
CLOSE = 256 + CONTROLS.index("<close>")
QUESTION = "how?"
EVENT = r"\[[^\n]*\n"
"""A pattern for a line of the stream, a frame's among them."""
PICTURE = r"\[[\d:]*\] camera {}: <image>#+</image>\n"

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("reading"), st.integers(0, 40)),
        st.tuples(st.just("frame"), st.sampled_from(["door", "garden"])),
        st.tuples(st.just("ask"), st.booleans()),
        st.tuples(st.just("look"), st.sampled_from(["door", "garden"])),
        st.tuples(st.just("cancel"), st.integers(0, 5)),
        st.tuples(st.just("turn"), st.integers(1, 20)),
        st.tuples(st.just("talk"), st.integers(0, 5)),
        st.tuples(st.just("restart"), st.booleans()),
    ),
    max_size=60,
)


class Asked(NamedTuple):
    """An ask of a run."""

    sink: Sink
    ticket: Ticket
    parent: Callable[[DrivenEngine], list[Any]]
    """What its prompt goes on from."""
    turn: str
    """A pattern for the rest of its prompt."""
    catch_up: bool = False


class Run:
    """An engine, what it was asked, and the conversations that it keeps."""

    def __init__(self, chunk_tokens: int, fails: set[int]) -> None:
        self.n_runs = 0
        self.fails = fails
        self.engine = DrivenEngine(FakeModel(), chunk_tokens=chunk_tokens, **SESSIONS)
        self.engine.model.on_run = self.on_run
        self.chunk_tokens = chunk_tokens
        self.asks: list[Asked] = []
        self.n_checked = 0
        self.kept: dict[str, list[Any]] = {}
        """By a session's name, all that was read and said in it."""

    def on_run(self, what: str, n_tokens: int) -> None:
        self.n_runs += 1
        if self.n_runs in self.fails:
            raise RuntimeError("a defect")

    def do(self, n: int, step: str, value: Any) -> None:
        engine = self.engine
        if step == "reading":
            engine.observe(reading(n, "x" * value))
        elif step == "frame":
            engine.observe(frame(n, value, height=2 * (n % 5 + 1)))
        elif step == "cancel" and self.asks:
            self.asks[value % len(self.asks)].ticket.cancel()
        elif step == "ask" and engine.status().queue_depth < 8:
            self.ask("", live if value else blank, use_context=value)
        elif step == "look" and value in engine.cameras() and engine.status().queue_depth < 8:
            self.ask(PICTURE.format(value), live, camera=value)
        elif step == "talk" and engine.status().queue_depth < 8:
            self.talk(value)
        elif step == "restart":
            self.restart(saving=value)
        elif step == "turn":
            for _ in range(value):
                self.turn()

    def talk(self, value: int) -> None:
        """To keep a session, or to go on with one, now and then catching up."""
        ends = [asked.sink.end for asked in self.asks]
        names = [end.session for end in ends if isinstance(end, Done) and end.session]
        if not names or value == 0:
            self.ask("", live, keep_session=True)
            return
        name, catch_up = names[value % len(names)], value % 2 == 0
        with contextlib.suppress(NotFound):  # one that made way
            turn = f"<user>({EVENT})*" if catch_up else "<user>"
            self.ask(turn, lambda _: self.kept[name], session=name, catch_up=catch_up)

    def ask(self, turn: str, parent: Callable[[DrivenEngine], list[Any]], **changes: Any) -> None:
        sink, ticket = self.engine.ask(QUESTION, **changes)
        turn += re.escape(QUESTION) + "<close>"
        self.asks.append(Asked(sink, ticket, parent, turn, changes.get("catch_up", False)))

    def restart(self, *, saving: bool) -> None:
        """Once all is done; `saving` saves while it runs, as well, what a kill would leave."""
        while self.turn():
            pass
        if self.engine.status().counters["defects"]:
            return
        snapshot = self.engine._snapshot()
        if saving:
            snapshot = self.engine._context.freeze()
            self.engine._context.thaw()
        before = live(self.engine)
        self.engine = DrivenEngine(FakeModel(), opened=False, chunk_tokens=self.chunk_tokens, **SESSIONS)
        self.engine.restore(lambda: snapshot)
        self.engine._asks.open()
        self.engine.model.on_run = self.on_run
        assert live(self.engine) == before

    def turn(self) -> bool:
        waiting = [asked for asked in self.asks if asked.sink.end is None]
        worked = self.engine.turn()
        ended = [asked for asked in waiting if asked.sink.end is not None]
        spoke = [asked for asked in ended if asked.sink.text]
        assert len(spoke) <= 1
        for asked in spoke:
            self.check_answer(asked)
        if ended:
            self.check_sessions()
        return worked

    def finish(self) -> None:
        while self.turn():
            check_context(self.engine)
        assert all(asked.sink.end is not None for asked in self.asks)
        assert self.n_checked == sum(bool(asked.sink.text) for asked in self.asks)

    def check_answer(self, asked: Asked) -> None:
        """What was said goes on greedily from a whole prompt, whatever ended it; so does what is kept of it."""
        check_context(self.engine)
        trace, text, end = list(self.engine.fork.trace), asked.sink.text, asked.sink.end
        closed = len(trace) - trace[::-1].index(CLOSE)
        prompt, read = trace[:closed], trace[closed:]
        parent = asked.parent(self.engine)
        assert prompt[: len(parent)] == parent
        self.check_turn(asked, parent, prompt[len(parent) :])
        assert text == self.greedy(prompt, len(text))
        assert read == list(text.encode())[: len(read)]
        assert len(text) == 4 or not isinstance(end, Done) or end.finish_reason is FinishReason.CANCELLED
        if isinstance(end, Done) and end.session:
            self.kept[end.session] = [*prompt, *text.encode()]
        self.n_checked += 1

    def check_turn(self, asked: Asked, parent: list[Any], turn: list[Any]) -> None:
        """It is what was asked, behind the newest events in their order, none of them read twice."""
        text, told = traced(turn).text, shown(self.engine)
        assert re.fullmatch(asked.turn, text), text
        new, seen = numbers(text), numbers(traced([*parent, *turn]).text)
        assert new == told[len(told) - len(new) :]
        assert seen == sorted(set(seen))
        room = self.engine.fork.capacity - len(parent) > 256
        if asked.catch_up and room and not self.engine.status().counters["defects"]:
            assert seen[-1:] == told[-1:]

    def check_sessions(self) -> None:
        """Each holds its whole conversation, and nothing of an answer that came to nothing."""
        for name, session in self.engine._sessions._open.items():
            assert [*session.state.trace, *session.unread] == self.kept[name]  # type: ignore[attr-defined]

    def greedy(self, prompt: list[Any], n_tokens: int) -> str:
        state = traced(prompt)
        for _ in range(n_tokens):
            state.trace.append(int(self.engine.model.logits(state).argmax()))
        return bytes(state.trace[len(prompt) :]).decode()


def live(engine: DrivenEngine) -> list[Any]:
    return list(engine.live.trace)


def blank(engine: DrivenEngine) -> list[Any]:
    return list(engine._context.blank.trace)  # type: ignore[attr-defined]


def traced(trace: list[Any]) -> FakeState:
    state = FakeState(len(trace))
    state.trace = list(trace)
    return state


CONVERSATION = [("reading", 3), ("talk", 0), ("turn", 20)] + 3 * [
    *[("reading", 0), ("frame", "door"), ("turn", 20), ("talk", 2), ("turn", 20)],
    *[("reading", 0), ("restart", False), ("talk", 2), ("turn", 20), ("talk", 1), ("turn", 20)],
]
"""It catches up before and after restarts, and in between does not."""


@settings(max_examples=150)
@example(CONVERSATION, 32)
@example([("reading", 0)] * 3 + [("talk", 0), ("turn", 15), ("talk", 2), ("turn", 2), ("cancel", 1)], 8)
@example([("reading", 0)] * 2 + [("talk", 0), ("turn", 9), ("talk", 2), ("turn", 2), ("cancel", 1)], 32)
@given(STEPS, st.sampled_from([8, 32, 64]))
def test_the_context_is_always_the_newest_events_read_plainly(steps: list[tuple[str, Any]], chunk_tokens: int) -> None:
    run = Run(chunk_tokens, set())
    for n, (step, value) in enumerate(steps):
        run.do(n, step, value)
        check_context(run.engine)
    run.finish()
    expected = [n for n, (step, _) in enumerate(steps) if step == "reading"]
    assert shown(run.engine) == expected[len(expected) - len(shown(run.engine)) :]
    assert run.engine.status().counters["defects"] == 0


@settings(max_examples=100)
@example([("frame", "door"), ("talk", 0), ("restart", False), ("talk", 2)], {11})
@example([("reading", 0)] * 4 + [("frame", "door"), ("talk", 0), ("turn", 10), ("look", "door"), ("talk", 2)], {16})
@given(STEPS, st.sets(st.integers(1, 80), max_size=4))
def test_defects_anywhere_cost_events_and_asks_but_never_the_truth(
    steps: list[tuple[str, Any]], fails: set[int]
) -> None:
    run = Run(32, set(fails))
    with unlogged():
        for n, (step, value) in enumerate(steps):
            run.do(n, step, value)
        run.finish()
    run.fails.clear()
    run.engine.observe(reading(99_999, "x"))
    run.engine.settle()
    check_context(run.engine)
    assert shown(run.engine)[-1] == 99_999
    assert run.engine.answer()


@contextlib.contextmanager
def unlogged() -> Iterator[None]:
    logging.disable()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def shown(engine: DrivenEngine) -> list[int]:
    """The numbers of the readings that the context holds."""
    return numbers(engine.live.text)


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\] s x*(\d+)\n", text)]


def check_context(engine: DrivenEngine) -> None:
    """Whole lines of consecutive readings behind the system prompt, within the window."""
    text = engine.live.text
    assert text.startswith(OPENING)
    assert engine.live.position <= 256
    body = text.removeprefix(OPENING)
    assert not body or body.endswith("\n")
    assert body.count("<image>") == body.count("</image>\n")
    assert numbers(text) == sorted(set(numbers(text)))


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 60), st.booleans()), min_size=1, max_size=80))
def test_asks_in_between_leave_the_context_as_if_nobody_had_asked(events: list[tuple[int, bool]]) -> None:
    asked, quiet = DrivenEngine(), DrivenEngine()
    for n, (length, asks) in enumerate(events):
        for engine in (asked, quiet):
            engine.observe(reading(n, "x" * length))
        if asks:
            sink, _ = asked.ask()
            asked.turns_until(lambda sink=sink: sink.end is not None)  # type: ignore[misc]
            assert isinstance(sink.end, Done)
        asked.settle()
        quiet.settle()
    assert asked.live.trace == quiet.live.trace
    assert np.array_equal(asked.model.logits(asked.live), quiet.model.logits(quiet.live))
