"""Whatever the interleaving of events, asks, cancels and swaps: the answers are those of the plain reading."""

import contextlib
import logging
from typing import Any

import numpy as np
from engine_driver import SYSTEM, DrivenEngine, Sink, frame, reading
from fake_model import CONTROLS, FakeModel
from hypothesis import given, settings
from hypothesis import strategies as st

from iotd.engine.context import SLACK_TOKENS
from iotd.errors import NotFound
from iotd.events import Done

OPENING = f"<system>{SYSTEM}<end><user>"
SESSIONS = {"session_bytes": 2 * (256 + SLACK_TOKENS + 256) * 8}
"""Room for two of them."""
CLOSE = 256 + CONTROLS.index("<close>")

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


class Run:
    """An engine, what it was told, and what its context held at each moment."""

    def __init__(self, chunk_tokens: int, fails: set[int]) -> None:
        self.n_runs = 0
        self.fails = fails
        self.engine = DrivenEngine(FakeModel(), chunk_tokens=chunk_tokens, **SESSIONS)
        self.engine.model.on_run = self.on_run
        self.chunk_tokens = chunk_tokens
        self.asks: list[tuple[Sink, Any]] = []
        self.contexts = {tuple(self.engine.live.trace)}
        self.checked = 0

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
            self.asks[value % len(self.asks)][1].cancel()
        elif step == "ask" and engine.status().queue_depth < 8:
            self.asks.append(engine.ask(use_context=value))
        elif step == "look" and value in engine.cameras() and engine.status().queue_depth < 8:
            self.asks.append(engine.ask(camera=value))
        elif step == "talk" and engine.status().queue_depth < 8:
            with contextlib.suppress(NotFound):  # one that made way
                self.asks.append(engine.ask(**self.said(value)))
        elif step == "restart":
            self.restart(saving=value)
        elif step == "turn":
            for _ in range(value):
                self.turn()

    def said(self, value: int) -> dict[str, Any]:
        """To keep a session, or to go on with one, now and then catching up."""
        names = [sink.end.session for sink, _ in self.asks if isinstance(sink.end, Done) and sink.end.session]
        if not names or value == 0:
            return {"keep_session": True}
        return {"session": names[value % len(names)], "catch_up": value % 2 == 0}

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
        live = list(self.engine.live.trace)
        self.engine = DrivenEngine(FakeModel(), opened=False, chunk_tokens=self.chunk_tokens, **SESSIONS)
        self.engine.restore(lambda: snapshot)
        self.engine._asks.open()
        self.engine.model.on_run = self.on_run
        assert self.engine.live.trace == live

    def turn(self) -> bool:
        worked = self.engine.turn()
        self.contexts.add(tuple(self.engine.live.trace))
        self.check_answer()
        return worked

    def check_answer(self) -> None:
        """An answer that has just come to its end continues a whole context of its time, greedily."""
        ended = [sink for sink, _ in self.asks if sink.end is not None]
        if len(ended) == self.checked:
            return
        self.checked = len(ended)
        fork = self.engine.fork.trace
        if fork.count(CLOSE) != 1:
            return
        closed = fork.index(CLOSE) + 1
        assert any(tuple(fork[: len(context)]) == context for context in self.contexts)
        for n in range(closed, len(fork)):
            self.engine._fork.trace = fork[:n]  # type: ignore[attr-defined]
            assert fork[n] == int(self.engine.model.logits(self.engine.fork).argmax())
        self.engine._fork.trace = fork  # type: ignore[attr-defined]


@settings(max_examples=150, deadline=None)
@given(STEPS, st.sampled_from([8, 32, 64]))
def test_the_context_is_always_the_newest_events_read_plainly(steps: list[tuple[str, Any]], chunk_tokens: int) -> None:
    run = Run(chunk_tokens, set())
    for n, (step, value) in enumerate(steps):
        run.do(n, step, value)
        check_context(run.engine)
    while run.turn():
        check_context(run.engine)
    expected = [n for n, (step, _) in enumerate(steps) if step == "reading"]
    assert shown(run.engine) == expected[len(expected) - len(shown(run.engine)) :]
    assert all(sink.end is not None for sink, _ in run.asks)
    assert run.engine.status().counters["defects"] == 0


@settings(max_examples=100, deadline=None)
@given(STEPS, st.sets(st.integers(1, 80), max_size=4))
def test_defects_anywhere_cost_events_and_asks_but_never_the_truth(
    steps: list[tuple[str, Any]], fails: set[int]
) -> None:
    run = Run(32, fails)
    logging.disable()
    for n, (step, value) in enumerate(steps):
        run.do(n, step, value)
    while run.turn():
        pass
    logging.disable(logging.NOTSET)
    assert all(sink.end is not None for sink, _ in run.asks)
    run.fails.clear()
    run.engine.observe(reading(99_999, "x"))
    run.engine.settle()
    check_context(run.engine)
    assert shown(run.engine)[-1] == 99_999
    assert run.engine.answer()


def shown(engine: DrivenEngine) -> list[int]:
    """The numbers of the readings that the context holds."""
    lines = engine.live.text.removeprefix(OPENING).split("\n")
    return [int(line.split(" s ")[1].lstrip("x")) for line in lines if " s " in line]


def check_context(engine: DrivenEngine) -> None:
    """Whole lines of consecutive readings behind the system prompt, within the window."""
    text = engine.live.text
    assert text.startswith(OPENING)
    assert engine.live.position <= 256
    body = text.removeprefix(OPENING)
    assert not body or body.endswith("\n")
    assert body.count("<image>") == body.count("</image>\n")
    numbers = shown(engine)
    assert numbers == sorted(numbers)


@settings(max_examples=50, deadline=None)
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
