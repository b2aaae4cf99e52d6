"""The engine with its threads: start, drain, stop, deadlines during long units, and many callers at once."""

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from engine_driver import SYSTEM, ManualClock, frame, image, reading
from fake_model import FakeModel
from patience import PATIENCE_S

from iotd.config import AskConfig, ContextConfig
from iotd.engine import Engine
from iotd.errors import DeadlineExceeded, Overloaded, Unavailable
from iotd.events import AnswerEvent, Ask, Delta, Done, Failed, FinishReason, Sampling


class Gate:
    """Holds the model at one kind of run until the test lets it go on."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.shut = threading.Event()
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self, what: str, n_tokens: int) -> None:
        if what == self.kind and self.shut.is_set():
            self.reached.set()
            assert self.open.wait(PATIENCE_S)


@contextmanager
def running(
    model: FakeModel | None = None,
    drain_s: float = PATIENCE_S,
    clock: Callable[[], float] = time.monotonic,
    **ask: int,
) -> Iterator[Engine]:
    context = ContextConfig(window=256, system=SYSTEM, chunk_tokens=32, backlog=32)
    config = AskConfig(**{"reserve_tokens": 256, **ask})  # type: ignore[arg-type]
    engine = Engine(model or FakeModel(), context, config, clock=clock)  # type: ignore[arg-type]
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(drain_s)


class Listener:
    """Collects an ask's events across threads; `end` waits for the last."""

    def __init__(self) -> None:
        self.events: list[AnswerEvent] = []
        self._end: queue.Queue[Done | Failed] = queue.Queue()
        self.spoke = threading.Event()

    def __call__(self, event: AnswerEvent) -> None:
        self.events.append(event)
        if isinstance(event, Delta):
            self.spoke.set()
        if isinstance(event, Done | Failed):
            self._end.put(event)

    def end(self) -> Done | Failed:
        return self._end.get(timeout=PATIENCE_S)


def make_ask(
    question: str = "how?",
    budget_s: float = PATIENCE_S,
    max_tokens: int = 4,
    clock: Callable[[], float] = time.monotonic,
    **changes: object,
) -> Ask:
    now_s = clock()
    return Ask(question, now_s, now_s + budget_s, sampling=Sampling(max_tokens=max_tokens, temperature=0), **changes)  # type: ignore[arg-type]


def failure(end: Done | Failed) -> Exception:
    assert isinstance(end, Failed)
    return end.error


def test_an_ask_is_answered() -> None:
    with running() as engine:
        assert engine.status().ready
        listener = Listener()
        ticket = engine.submit(make_ask(), listener)
        end = listener.end()
    assert isinstance(end, Done)
    assert end.finish_reason is FinishReason.LENGTH
    assert ticket.request_id == ticket.accepted.request_id


def test_one_thread_runs_the_model() -> None:
    threads: set[str] = set()
    with running(FakeModel(on_run=lambda what, n: threads.add(threading.current_thread().name))) as engine:
        engine.observe(frame(1))
        listener = Listener()
        engine.submit(make_ask(camera="door"), listener)
        listener.end()
    assert threads == {"iotd-engine"}


def test_start_raises_what_reading_the_system_prompt_raised() -> None:
    def on_run(what: str, n_tokens: int) -> None:
        raise RuntimeError("broken model")

    engine = Engine(FakeModel(on_run=on_run), ContextConfig(window=256, system=SYSTEM), AskConfig())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="broken model"):
        engine.start()
    with pytest.raises(Unavailable):
        engine.submit(make_ask(), Listener())
    engine.stop(0)


def test_asks_are_refused_while_loading() -> None:
    gate = Gate("prefill")
    gate.shut.set()
    engine = Engine(FakeModel(on_run=gate), ContextConfig(window=256, system=SYSTEM), AskConfig())  # type: ignore[arg-type]
    starting = threading.Thread(target=engine.start)
    starting.start()
    assert gate.reached.wait(PATIENCE_S)
    with pytest.raises(Unavailable, match="loading"):
        engine.submit(make_ask(), Listener())
    assert not engine.status().ready
    gate.open.set()
    starting.join(PATIENCE_S)
    assert engine.status().ready
    engine.stop(0)


@pytest.mark.parametrize("kind", ["encode", "place"])
def test_a_silent_ask_fails_on_time_even_inside_a_long_unit(kind: str) -> None:
    gate = Gate(kind)
    clock = ManualClock()
    with running(FakeModel(on_run=gate), clock=clock) as engine:
        gate.shut.set()
        runs, waits = Listener(), Listener()
        engine.submit(make_ask(images=(image(),), budget_s=1.0, clock=clock), runs)
        assert gate.reached.wait(PATIENCE_S)
        engine.submit(make_ask(budget_s=0.1, clock=clock), waits)
        clock.now_s += 2
        assert isinstance(failure(waits.end()), DeadlineExceeded)
        assert isinstance(failure(runs.end()), DeadlineExceeded)
        assert not gate.open.is_set()
        gate.open.set()
        after = Listener()
        engine.submit(make_ask(clock=clock), after)
        assert isinstance(after.end(), Done)
    assert len(runs.events) == 1


def test_a_cancel_stops_an_answer_under_way() -> None:
    with running(reserve_tokens=100_000) as engine:
        listener = Listener()
        ticket = engine.submit(make_ask(max_tokens=90_000), listener)
        assert listener.spoke.wait(PATIENCE_S)
        ticket.cancel()
        end = listener.end()
    assert isinstance(end, Done)
    assert end.finish_reason is FinishReason.CANCELLED


def test_a_stop_finishes_what_was_asked_before_it() -> None:
    gate = Gate("prefill")
    with running(FakeModel(on_run=gate)) as engine:
        gate.shut.set()
        listeners = [Listener() for _ in range(4)]
        for listener in listeners:
            engine.submit(make_ask(), listener)
        assert gate.reached.wait(PATIENCE_S)
        stopping = threading.Thread(target=engine.stop, args=(PATIENCE_S,))
        stopping.start()
        while engine.status().ready:
            pass
        with pytest.raises(Unavailable, match="stopping"):
            engine.submit(make_ask(), Listener())
        gate.open.set()
        assert all(isinstance(listener.end(), Done) for listener in listeners)
        stopping.join(PATIENCE_S)
        assert not stopping.is_alive()


def test_a_stop_fails_what_does_not_end_in_time() -> None:
    gate = Gate("step")
    with running(FakeModel(on_run=gate)) as engine:
        gate.shut.set()
        runs, waits = Listener(), Listener()
        engine.submit(make_ask(), runs)
        assert gate.reached.wait(PATIENCE_S)
        engine.submit(make_ask(), waits)
        stopping = threading.Thread(target=engine.stop, args=(0.01,))
        stopping.start()
        assert isinstance(failure(runs.end()), Unavailable)
        assert isinstance(failure(waits.end()), Unavailable)
        gate.open.set()
        stopping.join(PATIENCE_S)
        assert not stopping.is_alive()


def test_a_stop_without_a_start_and_a_second_stop_do_nothing() -> None:
    engine = Engine(FakeModel(), ContextConfig(window=256, system=SYSTEM), AskConfig())  # type: ignore[arg-type]
    engine.stop(0)
    with running() as engine:
        engine.stop(0)


def test_an_idle_engine_shows_that_it_lives_and_a_stuck_one_does_not() -> None:
    gate = Gate("prefill")
    now_s = 0.0
    beats: queue.Queue[float] = queue.Queue()

    def clock() -> float:
        if threading.current_thread().name == "iotd-engine":
            beats.put(now_s)
        return now_s

    context = ContextConfig(window=256, system=SYSTEM)
    engine = Engine(FakeModel(on_run=gate), context, AskConfig(), clock=clock)  # type: ignore[arg-type]
    engine.start()
    now_s = 100.0
    while beats.get(timeout=PATIENCE_S) != 100.0:
        pass
    beats.get(timeout=PATIENCE_S)  # the beat before this one has been noted
    assert engine.progress_s() == 0.0
    gate.shut.set()
    engine.observe(reading(1))
    assert gate.reached.wait(PATIENCE_S)
    now_s = 200.0
    assert engine.progress_s() == 100.0
    gate.open.set()
    engine.stop(0)


def test_many_threads_at_once_lose_no_ask_and_no_event() -> None:
    """Each ask ends exactly once, after its deltas; each event is read, dropped or still waiting."""
    asked: list[tuple[Listener, bool]] = []
    refused: list[Listener] = []

    def askers(seed: int, engine: Engine) -> None:
        chance = random.Random(seed)
        for n in range(60):
            listener = Listener()
            try:
                ticket = engine.submit(make_ask(f"{n}?", budget_s=chance.choice([0.0, 0.002, PATIENCE_S])), listener)
            except Overloaded as overloaded:
                assert overloaded.retry_after_s > 0
                refused.append(listener)
                continue
            asked.append((listener, True))
            if chance.random() < 0.3:
                ticket.cancel()
            if chance.random() < 0.5:
                listener.end()
                listener._end.put(listener.events[-1])  # type: ignore[arg-type]

    def observers(seed: int, engine: Engine) -> None:
        for n in range(400):
            engine.observe(frame(n, f"camera{seed}") if n % 40 == 0 else reading(n))
            engine.status()

    with running(FakeModel(eos_every=20), queue=4) as engine:
        threads = [threading.Thread(target=askers, args=(seed, engine)) for seed in range(4)]
        threads += [threading.Thread(target=observers, args=(seed, engine)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        for listener, _ in asked:
            listener.end()
    counters = engine.status().counters
    assert engine.status().queue_depth == 0
    assert counters["asks"] == len(asked)
    assert counters["asks_rejected"] + counters["asks_refused"] == len(refused)
    assert counters["defects"] == 0
    ends = sum(counters[f"asks_{name}"] for name in ("stop", "length", "budget", "cancelled", "expired", "failed"))
    assert ends == len(asked)
    for listener, _ in asked:
        assert [isinstance(event, Done | Failed) for event in listener.events].count(True) == 1
        assert isinstance(listener.events[-1], Done | Failed)
    arrived = counters["readings"] + counters["frames"]
    read = counters["readings_read"] + counters["frames_read"]
    dropped = counters["dropped_readings"] + counters["coalesced_readings"] + counters["dropped_frames"]
    assert arrived == 1200 == read + dropped + engine.status().backlog
