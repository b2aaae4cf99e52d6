"""The asks inside the engine, from their admission to their end: bounded, earliest deadline first, each ended once.

One is admitted only where it fits between those that were before: what is kept for them is not given away. Any thread
admits and ends; one thread takes. Knows no model, and a clock only as numbers it is handed.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from iotd.counters import Counters
from iotd.engine.call import Call
from iotd.engine.costs import Costs
from iotd.engine.plan import CAUTION, Planned, Planner
from iotd.engine.schedule import Gap, Slot, gap, latest_start
from iotd.errors import DeadlineExceeded, Overloaded, Unavailable
from iotd.events import Answered, Done, Failed, FinishReason, Timings

log = logging.getLogger(__name__)

SHOWN = 8
"""Asks whose ends are told in the status."""
SOON_S = 0.001
"""A refused ask is never told to try again sooner."""
JUDGED = 256
"""Asks whose predicted times are held against what they took."""


class Asks:
    """A short queue and the one ask that runs. Refuses everything until it is opened."""

    def __init__(
        self,
        capacity: int,
        planner: Planner,
        costs: Costs,
        counters: Counters,
        on_answer: Callable[[Answered], None] | None = None,
    ) -> None:
        """on_answer: told how each ask ended, on the thread that ends it. Must not block."""
        self.reading_share = 0.0
        """What reading will take between two asks, as a part of what the one before takes."""
        self.debt_s = 0.0
        """What reading will take before the next ask."""
        self._planner = planner
        self._costs = costs
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
        self._errors: deque[float] = deque(maxlen=JUDGED)
        self.latest_start_s = math.inf
        """When the model must be free for those that wait, so that each gets what is kept for it."""
        self.latest_least_s = math.inf
        """The same for the least answer to each."""

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

    @property
    def errors(self) -> list[float]:
        """How far predictions were off of late, as parts of what the answers took."""
        return list(self._errors)

    def admit(self, call: Call, now_s: float) -> int:
        """Queue a call with a plan. Returns how many asks are in front of it, the running one included.

        Raises Unavailable while loading or draining, Overloaded where the queue is full or no useful answer fits.
        """
        with self._changed:
            if self._refusal:
                raise Unavailable(self._refusal)
            if len(self._waiting) >= self._capacity:
                self._counters.add("asks_rejected")
                free_s = max(SOON_S, round(self._free_s(now_s) - now_s, 3))
                raise Overloaded(f"{len(self._waiting)} asks are waiting already", retry_after_s=free_s)
            call.planned, n_ahead = self._planned(call, now_s)
            self._waiting.append(call)
            self._look_ahead()
            self._counters.add("asks")
            return n_ahead

    def _planned(self, call: Call, now_s: float) -> tuple[Planned, int]:
        """A plan between those that wait, and how many asks go before. Raises Overloaded."""
        found = self._gap(call, self._waiting, self._free_s(now_s))
        if (planned := self._fit(call, found)) is not None:
            return planned, found.n_ahead + (self._running is not None)
        running = self._running
        if running is not None and running.preemptible and running.ask.deadline_s > call.ask.deadline_s:
            unit_end_s = max(now_s, self._costs.busy_until_s) + self.debt_s
            sooner = self._gap(call, [*self._waiting, running], unit_end_s)
            if (planned := self._fit(call, sooner)) is not None:
                call.preempts = True
                return planned, sooner.n_ahead
        self._counters.add("asks_refused")
        raise self._refused(call, found.all_s)

    def _gap(self, call: Call, others: list[Call], free_s: float) -> Gap:
        return gap(self._slots(others), call.ask.deadline_s, free_s, self.reading_share)

    def _fit(self, call: Call, found: Gap) -> Planned | None:
        return self._planner.fit(call.work, found.end_s - found.begin_s, found.begin_s - call.ask.arrived_s)

    def _refused(self, call: Call, start_s: float) -> Overloaded:
        """start_s: when it would begin, behind all that wait."""
        least_s = self._planner.least(call.work).least_s
        needed_s = start_s + least_s - call.ask.arrived_s
        budget_s = call.ask.deadline_s - call.ask.arrived_s
        waits = f", of which it would wait {wait_s:.3g} s" if (wait_s := needed_s - least_s) > SOON_S else ""
        return Overloaded(
            f"the budget ends too soon: the shortest answer would take {needed_s:.3g} s{waits}",
            retry_after_s=max(SOON_S, round(needed_s - budget_s, 3)),
            needed_s=needed_s,
        )

    def _free_s(self, now_s: float) -> float:
        """When the asks that wait can begin: behind the running one, or what is being read."""
        busy_until_s = self._costs.busy_until_s
        if self._running is not None:
            busy_until_s = max(busy_until_s, self._running.reserved_end_s)
        return max(now_s, busy_until_s) + self.debt_s

    def _slots(self, calls: list[Call]) -> list[Slot]:
        return [Slot(call.ask.deadline_s, self._reserved_s(call)) for call in calls]

    def _reserved_s(self, call: Call) -> float:
        """What is kept for an ask: for the running one, should it make way, to read again and go on."""
        assert call.planned is not None
        if call is not self._running:
            return call.planned.reserved_s
        return self._again_s(call, max(1, call.reserved_left()))

    def _again_s(self, call: Call, n_tokens: int) -> float:
        """What it takes to read all of it again and say so many tokens more."""
        planned = call.planned
        assert planned is not None
        again_s = self._planner.again_s(call.work, planned.rung, call.meter.generation_tokens)
        return again_s + n_tokens * (planned.run_s + planned.token_s)

    def _look_ahead(self) -> None:
        """Those that wait are others now."""
        self.latest_start_s = latest_start(self._slots(self._waiting), self.reading_share)
        self.latest_least_s = latest_start(map(_least_slot, self._waiting), self.reading_share)

    def ends_s(self, call: Call) -> float:
        """When the running call must have ended: at its deadline, or before others begin unless it can go on later.

        What is kept for it goes before what is kept for them, but for the least answer to each.
        """
        latest_s = max(self.latest_start_s, min(self.latest_least_s, call.reserved_end_s))
        if latest_s >= call.ask.deadline_s or self._can_go_on(call):
            return call.ask.deadline_s
        return latest_s

    def must_be_preempted(self, call: Call, unit_s: float, now_s: float) -> bool:
        """Another needs the time of the running call's next unit, and the call can go on later."""
        if not self._waiting or not call.preemptible:
            return False
        with self._changed:
            if any(other.preempts and other.ask.deadline_s < call.ask.deadline_s for other in self._waiting):
                return True
        return now_s + unit_s > self.latest_start_s and self._can_go_on(call)

    def _can_go_on(self, call: Call) -> bool:
        """There is time for it behind those whose deadlines are sooner."""
        if not call.preemptible:
            return False
        with self._changed:
            later = self._gap(call, self._waiting, self.latest_start_s)
            return later.n_ahead > 0 and later.begin_s + self._reserved_s(call) <= call.ask.deadline_s

    def preempt(self, call: Call, now_s: float) -> None:
        """The running call waits again."""
        with self._changed:
            assert call.planned is not None
            call.planned = replace(call.planned, least_s=self._again_s(call, 1), reserved_s=self._reserved_s(call))
            call.preempted_at_s = now_s
            self._running = None
            self._waiting.append(call)
            self._look_ahead()
            self._counters.add("asks_preempted")

    def take(self, now_s: float) -> Call | None:
        """The waiting call with the earliest deadline, the first come of equals; it runs until it is released."""
        with self._changed:
            assert self._running is None
            if not self._waiting:
                return None
            call = min(self._waiting, key=_deadline)
            self._waiting.remove(call)
            self._look_ahead()
            self._running = call
            call.preempts = False
            if call.meter.started_s is None:
                call.meter.started_s = now_s
            else:
                call.meter.preempted_s += now_s - call.preempted_at_s
            assert call.planned is not None
            call.reserved_end_s = now_s + call.planned.reserved_s
            return call

    def release(self, call: Call) -> None:
        """The call has ended and runs no longer, whoever ended it: count what it took."""
        self._counters.add("prompt_tokens", call.meter.prompt_tokens)
        self._counters.add("generation_tokens", call.meter.generation_tokens)
        with self._changed:
            if self._running is call:
                self._running = None
            self._changed.notify_all()

    def end(self, call: Call, event: Done | Failed) -> bool:
        """End a call and count how; nothing happens, and False is returned, where it has ended before."""
        if not call.end(event):
            return False
        self._counters.add(_name(event))
        if isinstance(event, Failed) and isinstance(event.error, DeadlineExceeded):
            log.info("%s had no word by its deadline: %s", call.request_id, call.trace())
        answered = _answered(call, event)
        if answered.predicted_s:
            self._errors.append(abs(answered.predicted_s / answered.timings.total_s - 1))
        self.recent.append(answered)
        if self._on_answer is not None:
            self._on_answer(answered)
        return True

    def settle(self, now_s: float) -> None:
        """End what waits in vain, as it was cancelled or its deadline has come; and the running one at its deadline."""
        with self._changed:
            over = [call for call in self._waiting if call.cancelled or call.expired(now_s)]
            if over:
                self._waiting = [call for call in self._waiting if call not in over]
                self._look_ahead()
            running = self._running
            self._changed.notify_all()
        for call in over:
            self.end(call, call.done(FinishReason.CANCELLED, now_s) if call.cancelled else call.overdue(now_s))
        if running is not None and running.expired(now_s):
            # The model is inside of a run that takes longer than any was expected to.
            self.end(running, running.overdue(now_s))

    def next_deadline_s(self, otherwise_s: float) -> float:
        """When `settle` may be needed next: the earliest deadline of all."""
        with self._changed:
            left = list(self._waiting)
            if self._running is not None and not self._running.ended:
                left.append(self._running)
        return min(map(_deadline, left), default=otherwise_s)

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


def _least_slot(call: Call) -> Slot:
    assert call.planned is not None
    return Slot(call.ask.deadline_s, call.planned.least_s * CAUTION)


def _deadline(call: Call) -> float:
    return call.ask.deadline_s


def _answered(call: Call, event: Done | Failed) -> Answered:
    budget_s = call.ask.deadline_s - call.ask.arrived_s
    if isinstance(event, Done):
        reason, predicted_s = event.finish_reason.value, call.predicted_s()
        return Answered(call.request_id, reason, budget_s, event.usage, event.timings, predicted_s)
    return Answered(call.request_id, event.error.code, budget_s, call.usage(), Timings())


def _name(event: Done | Failed) -> str:
    if isinstance(event, Done):
        return f"asks_{event.finish_reason.value}"
    return "asks_expired" if isinstance(event.error, DeadlineExceeded) else "asks_failed"
