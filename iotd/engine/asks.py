"""The asks inside the engine, from their admission to their end: bounded, earliest deadline first, each ended once.

Any thread admits and ends; one thread takes. Knows no model, and a clock only as numbers it is handed.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from statistics import fmean

from iotd.counters import Counters
from iotd.engine.call import Call
from iotd.errors import DeadlineExceeded, Overloaded, Unavailable
from iotd.events import Answered, Done, Failed, FinishReason, Timings

log = logging.getLogger(__name__)

SHOWN = 8
"""Asks whose ends are told in the status."""
RECENT = 16
"""Asks whose mean duration says when a refused one may try again."""


class Asks:
    """A short queue and the one ask that runs. Refuses everything until it is opened."""

    def __init__(self, capacity: int, counters: Counters, on_answer: Callable[[Answered], None] | None = None) -> None:
        """on_answer: told how each ask ended, on the thread that ends it. Must not block."""
        self._capacity = capacity
        self._counters = counters
        self._changed = threading.Condition()
        self._waiting: list[Call] = []
        self._running: Call | None = None
        self._draining = False
        self._refusal = "the model is still loading"
        self._on_answer = on_answer
        self.recent: deque[Answered] = deque(maxlen=SHOWN)
        """The asks that ended last."""
        self._recent_s: deque[float] = deque([1.0], maxlen=RECENT)

    @property
    def accepting(self) -> bool:
        return not self._refusal

    @property
    def depth(self) -> int:
        """Asks waiting or running."""
        with self._changed:
            return self._depth()

    @property
    def running(self) -> int:
        """Asks being answered."""
        return int(self._running is not None)

    def open(self) -> None:
        """Accept asks from now on, unless a drain has begun."""
        with self._changed:
            if not self._draining:
                self._refusal = ""

    def resize(self, capacity: int) -> None:
        """Let so many wait from now on; who waits already stays."""
        with self._changed:
            self._capacity = capacity

    def drain(self) -> None:
        """Refuse new asks from now on; those admitted are still answered."""
        with self._changed:
            self._draining = True
            self._refusal = "the daemon is stopping"

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no ask is waiting or running. False where the time ended first."""
        with self._changed:
            return self._changed.wait_for(lambda: self._depth() == 0, timeout_s)

    def admit(self, call: Call) -> int:
        """Queue a call. Returns how many asks are in front of it, the running one included.

        Raises Unavailable while loading or draining, Overloaded where the queue is full.
        """
        with self._changed:
            if self._refusal:
                raise Unavailable(self._refusal)
            if len(self._waiting) >= self._capacity:
                self._counters.add("asks_rejected")
                raise Overloaded(
                    f"{len(self._waiting)} asks are waiting already",
                    retry_after_s=max(0.001, round(fmean(self._recent_s), 3)),
                )
            ahead = sum(other.ask.deadline_s <= call.ask.deadline_s for other in self._waiting)
            self._waiting.append(call)
            self._counters.add("asks")
            return ahead + (self._running is not None)

    def take(self, now_s: float) -> Call | None:
        """The waiting call with the earliest deadline, the first come of equals; it runs until it is released."""
        with self._changed:
            assert self._running is None
            if not self._waiting:
                return None
            call = min(self._waiting, key=lambda waiting: waiting.ask.deadline_s)
            self._waiting.remove(call)
            self._running = call
            call.meter.started_s = now_s
            return call

    def release(self, call: Call, now_s: float) -> None:
        """The call runs no longer, whoever ended it: count what it took."""
        meter = call.meter
        assert meter.started_s is not None
        self._counters.add("prompt_tokens", meter.prompt_tokens)
        self._counters.add("generation_tokens", meter.generation_tokens)
        with self._changed:
            self._running = None
            self._recent_s.append(now_s - meter.started_s)
            self._changed.notify_all()

    def end(self, call: Call, event: Done | Failed, *, only_if_silent: bool = False) -> bool:
        """End a call and count how; nothing happens, and False is returned, where it has ended before."""
        if not call.end(event, only_if_silent=only_if_silent):
            return False
        self._counters.add(_name(event))
        if isinstance(event, Failed) and isinstance(event.error, DeadlineExceeded):
            log.info("%s had no word by its deadline: %s", call.request_id, call.trace())
        answered = _answered(call, event)
        self.recent.append(answered)
        if self._on_answer is not None:
            self._on_answer(answered)
        return True

    def settle(self, now_s: float) -> None:
        """End what waits in vain: cancelled asks in the queue, and all whose deadline came before their first word."""
        with self._changed:
            over = [call for call in self._waiting if call.cancelled or call.expired(now_s)]
            self._waiting = [call for call in self._waiting if call not in over]
            running = self._running
            self._changed.notify_all()
        for call in over:
            self.end(call, call.done(FinishReason.CANCELLED, now_s) if call.cancelled else call.overdue(now_s))
        if running is not None and not running.spoke and running.expired(now_s):
            self.end(running, running.overdue(now_s), only_if_silent=True)

    def next_deadline_s(self, otherwise_s: float) -> float:
        """When `settle` may be needed next: the earliest deadline of an ask that has not said anything."""
        with self._changed:
            silent = list(self._waiting)
            if self._running is not None and not (self._running.spoke or self._running.ended):
                silent.append(self._running)
        return min((call.ask.deadline_s for call in silent), default=otherwise_s)

    def close(self) -> None:
        """End every ask that is left with Unavailable."""
        self.drain()
        with self._changed:
            left, self._waiting = self._waiting, []
            if self._running is not None:
                left.append(self._running)
        for call in left:
            self.end(call, Failed(Unavailable("the daemon stopped before this was answered")))

    def _depth(self) -> int:
        return len(self._waiting) + (self._running is not None)


def _answered(call: Call, event: Done | Failed) -> Answered:
    budget_s = call.ask.deadline_s - call.ask.arrived_s
    if isinstance(event, Done):
        return Answered(call.request_id, event.finish_reason.value, budget_s, event.usage, event.timings)
    return Answered(call.request_id, event.error.code, budget_s, call.usage(), Timings())


def _name(event: Done | Failed) -> str:
    if isinstance(event, Done):
        return f"asks_{event.finish_reason.value}"
    return "asks_expired" if isinstance(event.error, DeadlineExceeded) else "asks_failed"
