"""An engine driven by hand: no threads, a manual clock, one unit of work at a time."""

from collections.abc import Callable
from typing import Any

import numpy as np
from fake_model import FakeModel, FakeState

from iotd.config import AskConfig, ContextConfig
from iotd.engine import Engine, Ticket
from iotd.events import RGB, AnswerEvent, Ask, Delta, Done, Failed, Frame, Reading, Sampling

NOON_S = 1_772_366_400.0
"""2026-03-01 12:00:00 UTC."""
SYSTEM = "sys"


class ManualClock:
    """Time stands still unless it is moved; a model's run can be given a cost."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s
        self.costs_s: dict[str, float] = {}
        """Seconds of one token of `prefill` or `place`, one `step`, one token of `encode`."""

    def __call__(self) -> float:
        return self.now_s

    def charge(self, what: str, n_tokens: int) -> None:
        self.now_s += self.costs_s.get(what, 0.0) * n_tokens


class Sink(list[AnswerEvent]):
    """Keeps what an ask is told."""

    def __call__(self, event: AnswerEvent) -> None:
        self.append(event)

    @property
    def text(self) -> str:
        return "".join(event.text for event in self if isinstance(event, Delta) and not event.thought)

    @property
    def thoughts(self) -> str:
        return "".join(event.text for event in self if isinstance(event, Delta) and event.thought)

    @property
    def end(self) -> Done | Failed | None:
        """The last event, where the ask has ended; checks that exactly one event is an end, and the last."""
        ends = [event for event in self if isinstance(event, Done | Failed)]
        assert len(ends) <= 1
        assert not ends or self[-1] is ends[0]
        return ends[0] if ends else None


class DrivenEngine(Engine):
    """`turn` runs one unit of work; `settle` runs all of it."""

    def __init__(self, model: FakeModel | None = None, *, opened: bool = True, **settings: Any) -> None:
        self.clock = ManualClock()
        self.model = model if model is not None else FakeModel()
        if getattr(self.model, "on_run", None) is FakeModel.silent:
            self.model.on_run = self.clock.charge
        context = {"window": 256, "system": SYSTEM, "chunk_tokens": 32, "backlog": 64}
        ask = {"queue": 8, "reserve_tokens": 256, "tell_length": False}
        context |= {key: value for key, value in settings.items() if key in ContextConfig.__struct_fields__}
        ask |= {key: value for key, value in settings.items() if key in AskConfig.__struct_fields__}
        super().__init__(self.model, ContextConfig(**context), AskConfig(**ask), clock=self.clock)  # type: ignore[arg-type]
        if opened:
            self._context.open()
            self._asks.open()

    @property
    def live(self) -> FakeState:
        return self._context.live  # type: ignore[return-value] # the stand-in's

    @property
    def fork(self) -> FakeState:
        return self._fork  # type: ignore[return-value] # the stand-in's

    @property
    def rebuilding(self) -> bool:
        """The context's successor is being built."""
        job = self._context._job
        return job is not None and job.rebuilds

    def turn(self) -> bool:
        return self._worker.turn()

    def settle(self) -> None:
        while self.turn():
            pass

    def turns_until(self, met: Callable[[], bool]) -> int:
        turns = 0
        while not met():
            assert self.turn(), "nothing is left to do"
            turns += 1
        return turns

    def turns_until_swap_begins(self) -> None:
        """Feed readings until the window is full and its successor is begun."""
        for n in range(1000):
            self.observe(reading(n))
            while not self.rebuilding and self.turn():
                pass
            if self.rebuilding:
                return

    def answer_one(self, question: str) -> str:
        """Submit an ask and work until it has ended; reading goes on only as the engine lets it."""
        sink, _ = self.ask(question)
        self.turns_until(lambda: sink.end is not None)
        self.turn()
        return sink.text

    def ask(self, question: str = "how?", budget_s: float = 1e6, **changes: Any) -> tuple[Sink, Ticket]:
        """Submit a greedy ask of four tokens that arrives now."""
        sampling = {"temperature": 0.0, "presence_penalty": 0.0, "max_tokens": 4}
        sampling |= {key: changes.pop(key) for key in list(changes) if key in Sampling.__slots__}
        sink = Sink()
        now_s = self.clock()
        ask = Ask(question, now_s, now_s + budget_s, sampling=Sampling(**sampling), **changes)
        return sink, self.submit(ask, sink)

    def answer(self, question: str = "how?", **changes: Any) -> str:
        sink, _ = self.ask(question, **changes)
        self.settle()
        assert isinstance(sink.end, Done), sink.end
        return sink.text


def reading(n: int, text: str = "on", source: str = "s") -> Reading:
    """The n-th reading of a day, one each second."""
    return Reading(source, f"{text}{n}", NOON_S + n)


def image(brightness: int = 0, height: int = 8, width: int = 8) -> RGB:
    return np.full((height, width, 3), brightness, np.uint8)


def frame(n: int, camera: str = "door", **shape: int) -> Frame:
    return Frame(camera, image(n % 256, **shape), NOON_S + n)
