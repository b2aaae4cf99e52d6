"""One ask on its way through the engine: who waits for it, whether it has ended, and where its time went.

Knows no model and no queue. Two threads touch a call (the model's and the one that watches deadlines), so its end is
decided under a lock: exactly one Done or Failed, and no Delta after it.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from iotd.engine.plan import Planned, Work
from iotd.errors import DeadlineExceeded
from iotd.events import Accepted, AnswerEvent, Ask, Delta, Done, Failed, FinishReason, Timings, Usage, Weighed

log = logging.getLogger(__name__)

Sink = Callable[[AnswerEvent], None]


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of work, from its beginning."""

    name: str
    began_s: float


@dataclass(slots=True)
class Meter:
    """What an answer took so far: seconds and tokens, written by the model's thread alone."""

    started_s: float | None = None
    """When the ask left the queue, on the engine's clock."""
    image_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    first_token_s: float = 0.0
    preempted_s: float = 0.0
    """Waiting for the model once more, after it had begun."""
    unit: Unit | None = None
    """The one that runs, or ran last."""
    context_tokens: int = 0
    prompt_tokens: int = 0
    image_tokens: int = 0
    generation_tokens: int = 0
    thinking_tokens: int = 0
    """Those of thoughts among them."""
    whole_tokens: int = 0
    """Of the answer, when nothing half was said last."""
    runs: int = 0
    """Of the model, behind the prompt."""
    run_tokens: int = 0
    """Read by these."""

    @property
    def answer_tokens(self) -> int:
        """Said, but for thoughts."""
        return self.generation_tokens - self.thinking_tokens


class Call:
    """An ask with its sink."""

    def __init__(self, ask: Ask, work: Work, sink: Sink, request_id: str, *, preemptible: bool = False) -> None:
        """preemptible: it can make way for another while it runs, and go on later."""
        self.ask = ask
        self.work = work
        self.request_id = request_id
        self.planned: Planned | None = None
        """As it was accepted; once it runs, as it was planned again."""
        self.reserved_end_s = 0.0
        """While it runs: when it will have said what is kept for it."""
        self.preemptible = preemptible
        self.preempted_at_s = 0.0
        """When it last made way."""
        self.preempts = False
        """It was admitted because the running one can make way."""
        self.meter = Meter()
        self.cancelled = False
        self.session = ""
        """By which its answer can be gone on with, once it has ended."""
        self.weighed: Weighed | None = None
        """What became of its labels, once that is known."""
        self._sink = sink
        self._lock = threading.Lock()
        self._told: Done | Failed | None = None
        """How it ended."""
        self._spoke = False
        self._ending = ""

    @property
    def ended(self) -> bool:
        return self._told is not None

    @property
    def told_session(self) -> str:
        """By which its asker was told that the answer can be gone on with."""
        return self._told.session if isinstance(self._told, Done) else ""

    @property
    def spoke(self) -> bool:
        """Some text of the answer has been given; thoughts are none."""
        return self._spoke

    def expired(self, now_s: float) -> bool:
        return now_s >= self.ask.deadline_s

    def speak(self, text: str, now_s: float, *, thought: bool = False, ending: str = "") -> None:
        """Give a piece of the answer, or of the thoughts before it; nothing happens where the call has ended.

        ending: what makes the answer whole, should its deadline come before the next piece.
        """
        with self._lock:
            if self.ended:
                return
            self._ending = ending
            if not text:
                return
            if not self._spoke and not thought:
                self._spoke = True
                self.meter.first_token_s = now_s - self.ask.arrived_s
            self._send(Delta(text, thought))

    def end(self, event: Done | Failed) -> bool:
        """End the call. False where it had ended before."""
        with self._lock:
            if self.ended:
                return False
            self._told = event
            if self._ending and isinstance(event, Done) and event.finish_reason is FinishReason.BUDGET:
                self._send(Delta(self._ending))
            self._send(event)
            return True

    def done(self, reason: FinishReason, now_s: float) -> Done:
        return Done(reason, self.usage(), self.timings(now_s), self.session, self.weighed)

    def overdue(self, now_s: float) -> Done | Failed:
        """How a call ends whose deadline has come: with what was said, or with an error."""
        if self._spoke:
            return self.done(FinishReason.BUDGET, now_s)
        budget_s = self.ask.deadline_s - self.ask.arrived_s
        where = "in the queue" if self.meter.started_s is None else "before the first piece of the answer"
        return Failed(DeadlineExceeded(f"the budget of {budget_s:.3g} s ended {where}"))

    def reserved_left(self) -> int:
        """Tokens that are kept for its sentence and not said so far; runs, of an answer of a given form."""
        assert self.planned is not None
        meter = self.meter
        said = meter.runs if self.work.kind == "form" else meter.answer_tokens
        kept_thinking = 0 if said else max(0, self.planned.reserved_thinking - meter.thinking_tokens)
        return max(0, self.planned.plan.reserved_tokens - (said - meter.whole_tokens)) + kept_thinking

    def trace(self) -> str:
        """Where the time went until the deadline, in words for the log; nothing of the question."""
        m, ask = self.meter, self.ask
        if m.started_s is None:
            return f"all {ask.deadline_s - ask.arrived_s:.2f} s in the queue"
        spent = f"queue {m.started_s - ask.arrived_s:.2f} s, image {m.image_s:.2f} s, prefill {m.prefill_s:.2f} s"
        if m.unit is None:
            return spent
        return f"{spent}; last unit {m.unit.name}, begun {ask.deadline_s - m.unit.began_s:.2f} s before the deadline"

    def usage(self) -> Usage:
        m = self.meter
        return Usage(m.context_tokens, m.prompt_tokens, m.image_tokens, m.generation_tokens)

    def predicted_s(self) -> float:
        """What the whole was planned to take when its turn came, for as many runs as it came to.

        0 before that, and where it had to make way for another.
        """
        if self.planned is None or self.meter.started_s is None or self.meter.preempted_s:
            return 0.0
        queue_s = self.meter.started_s - self.ask.arrived_s
        meter, planned = self.meter, self.planned
        return queue_s + planned.first_s + meter.runs * planned.run_s + meter.run_tokens * planned.token_s

    def timings(self, now_s: float) -> Timings:
        m, arrived_s = self.meter, self.ask.arrived_s
        started_s = now_s if m.started_s is None else m.started_s
        return Timings(
            queue_s=started_s - arrived_s + m.preempted_s,
            image_s=m.image_s,
            prefill_s=m.prefill_s,
            decode_s=m.decode_s,
            first_token_s=m.first_token_s,
            total_s=now_s - arrived_s,
        )

    def _send(self, event: AnswerEvent) -> None:
        try:
            self._sink(event)
        except Exception:
            log.exception("the receiver of answer %s failed; the ask is cancelled", self.request_id)
            self.cancelled = True


@dataclass(frozen=True, slots=True)
class Ticket:
    """What the asker holds while its answer is made."""

    accepted: Accepted
    cancel: Callable[[], None]
    """Stops the ask within one step, from any thread; it then ends as CANCELLED. Harmless after its end."""

    @property
    def request_id(self) -> str:
        return self.accepted.request_id
