"""How an answer fits into the time there is: the size of its images, whether and how long it thinks, its length.

Pure: a function of an ask's work and of what work costs. Knows no clock and no queue.
"""

from dataclasses import dataclass, replace
from math import ceil, floor

from iotd.engine.costs import Costs
from iotd.engine.lengths import Answers, Lengths
from iotd.events import Plan, Timings

LEAST_TOKENS = 3
"""What there must be time for: a few words."""
LEAST_RUNS = 2
"""The same for an answer of a given form: a run may bring many tokens, and it can be closed behind the first."""
AMPLE = 1.5
"""With room for so many times the usual answer, the model is not told how long its own may be."""
LEAST_THOUGHT = 8
"""Tokens; with less time the model does not think."""
CAUTION = 1.1
"""What is kept for an ask that waits is so much more than what its work usually takes."""
ANSWER_SHARE = 1 / 3
"""Of the tokens that there is time for, what is kept for the answer behind the thoughts; never less than is usual."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image on its way into a prompt: the tokens it takes at each size that it may have, the finest first."""

    sizes: tuple[int, ...]
    n_fine: int = 1
    """So many are sizes that the model is made for. The others are for where there is no answer otherwise."""
    encoded: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """What answering takes, in tokens."""

    kind: Answers
    position: int
    """Tokens that are read already."""
    parts: tuple[int | Picture, ...]
    """The prompt: so many tokens of text, and images between them."""
    max_tokens: int
    thinking: bool = False
    hint_tokens: int = 0
    """Of a line that tells the model how long its answer may be, should it be short of time; 0 tells nothing."""
    beside: tuple[int, ...] = ()
    """Tokens of runs behind the prompt that weigh labels."""
    room: int = 1 << 30
    """Tokens that can be read and said."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and what it was made with."""

    plan: Plan
    rung: int
    """How many sizes each image was made smaller by, as far as it has so many."""
    hint: bool
    """The model is told how long its answer may be."""
    first_s: float
    """From the beginning of its turn to its first token."""
    run_s: float
    """Each further run of it, besides its tokens."""
    token_s: float
    """Each token that such a run reads; 0 where it is always one, and in `run_s`."""
    least_s: float
    """What the least answer takes, slow where it may be."""
    reserved_thinking: int
    """Of the tokens for thinking, those that are kept for it."""
    reserved_s: float
    """What the reserved tokens take."""


class Planner:
    """Plans for one model. From any thread."""

    def __init__(self, costs: Costs, lengths: Lengths, chunk_tokens: int) -> None:
        self._costs = costs
        self._lengths = lengths
        self._chunk_tokens = chunk_tokens

    def fit(self, work: Work, time_s: float, queue_s: float = 0.0) -> Planned | None:
        """The best plan that takes `time_s` from its turn on; None where there is none. queue_s: the wait before."""
        usual = min(work.max_tokens, self._lengths.usual(work.kind))
        best: Planned | None = None
        for rung in range(_rungs(work)):
            if best is not None and rung >= _fine_rungs(work):
                break
            planned = self._at(work, rung, time_s, queue_s, usual)
            if work.hint_tokens and planned.plan.answer_tokens < min(work.max_tokens, AMPLE * usual):
                planned = self._hinted_at(work, rung, time_s, queue_s, usual)
            if planned.least_s > time_s:
                continue
            best = planned
            if planned.plan.answer_tokens >= usual:
                break
        return best

    def least(self, work: Work) -> Planned:
        """The plan that takes the least time."""
        return self._hinted_at(work, _rungs(work) - 1, 0.0, 0.0, 1)

    def again_s(self, work: Work, rung: int, n_said: int) -> float:
        """What it takes to read an ask's prompt again, and so many tokens that it has said."""
        seconds, at = self._prefill(replace(work, beside=()), rung)
        for n_tokens in _cut(n_said, self._chunk_tokens):
            seconds += self._costs.read_s(n_tokens, at)
            at += n_tokens
        return seconds

    def _run_sizes(self, work: Work, rung: int) -> list[int]:
        """Tokens of each run that reads the prompt."""
        sizes = _sizes(work, rung)
        size = run_size(sum(sizes), self._chunk_tokens)
        return [n for part in sizes for n in _cut(part, size)]

    def _hinted_at(self, work: Work, rung: int, time_s: float, queue_s: float, usual: int) -> Planned:
        """As `_at`; the model is told how long its answer may be, if it can be told."""
        return replace(self._at(_with_hint(work), rung, time_s, queue_s, usual), hint=work.hint_tokens > 0)

    def _at(self, work: Work, rung: int, time_s: float, queue_s: float, usual: int) -> Planned:
        pictures = [part for part in work.parts if isinstance(part, Picture)]
        image_s = sum(self._costs.image_s(_at_rung(part, rung)) for part in pictures if not part.encoded)
        prefill_s, end = self._prefill(work, rung)
        first_s, run_s, slow_s = image_s + prefill_s, self._run_s(work, end), self._run_s(work, end, slow=True)
        token_s = self._costs.form_s(1, end) - self._costs.form_s(0, end) if work.kind == "form" else 0.0
        least = {"text": min(LEAST_TOKENS, work.max_tokens), "form": LEAST_RUNS, "labels": 0}[work.kind]
        least_s = image_s + prefill_s * (1 + self._costs.read_spread) / 2
        least_s += max(0, least - 1) * (slow_s if work.kind == "form" else run_s) + slow_s * (least > 0)
        answer, thinking = self._shared(work, self._fits(work, end, time_s - first_s, run_s, slow_s), usual)
        kept = self._lengths.sentence if work.kind == "text" else usual
        reserved, reserved_thinking = min(answer, max(kept, least)), min(thinking, usual)
        decode_s = max(0, answer + thinking - 1) * run_s
        timings = Timings(
            queue_s=queue_s,
            image_s=image_s,
            prefill_s=prefill_s,
            decode_s=decode_s,
            first_token_s=queue_s + first_s,
            total_s=queue_s + first_s + decode_s,
        )
        plan = Plan(answer, reserved, thinking, sum(_at_rung(part, rung) for part in pictures), timings)
        reserved_s = max(least_s, (first_s + (reserved + reserved_thinking) * run_s) * CAUTION)
        own_run_s = run_s - token_s * self._lengths.run_tokens
        return Planned(plan, rung, False, first_s, own_run_s, token_s, least_s, reserved_thinking, reserved_s)

    def _fits(self, work: Work, position: int, time_s: float, run_s: float, slow_s: float) -> int:
        """Tokens that there is time and room for, the last one at a slow pace; one at least, and none with labels."""
        most = min(work.max_tokens, work.room - position + work.position)
        if work.kind == "labels":
            return 0
        return max(1, min(most, floor((time_s - slow_s) / run_s) + 2)) if run_s > 0 else most

    def _shared(self, work: Work, fits: int, usual: int) -> tuple[int, int]:
        """Tokens of the answer, and of the thoughts before it."""
        if not work.thinking:
            return fits, 0
        answer = min(fits, max(usual, ceil(fits * ANSWER_SHARE)))
        thinking = fits - answer
        return (answer, thinking) if thinking >= LEAST_THOUGHT else (fits, 0)

    def _prefill(self, work: Work, rung: int) -> tuple[float, int]:
        """Seconds of the fork and of reading the prompt, and the position behind it."""
        seconds, at = self._costs.fork_s(), work.position
        runs = self._run_sizes(work, rung)
        for i, n_tokens in enumerate(runs):
            seconds += self._costs.read_s(n_tokens, at, logits=i + 1 == len(runs))
            at += n_tokens
        return seconds + sum(self._costs.read_s(n_tokens, at, logits=True) for n_tokens in work.beside), at

    def _run_s(self, work: Work, position: int, *, slow: bool = False) -> float:
        if work.kind == "labels":
            return 0.0
        if work.kind == "form":
            return self._costs.form_s(self._lengths.run_tokens, position, slow=slow)
        return self._costs.step_s(position, slow=slow)


def run_size(n_tokens: int, chunk_tokens: int) -> int:
    """Tokens of each run at most, so that a prompt is read in even ones.

    A short one at the end would take as long as several tokens of a longer one.
    """
    return -(-n_tokens // max(1, round(n_tokens / chunk_tokens)))


def _with_hint(work: Work) -> Work:
    last = work.parts[-1]
    assert isinstance(last, int)  # what closes the turn is text
    return replace(work, parts=(*work.parts[:-1], last + work.hint_tokens))


def _sizes(work: Work, rung: int) -> list[int]:
    return [_at_rung(part, rung) if isinstance(part, Picture) else part for part in work.parts]


def _cut(n_tokens: int, size: int) -> list[int]:
    return [min(size, n_tokens - start) for start in range(0, n_tokens, size)]


def _rungs(work: Work) -> int:
    return max([1, *(len(part.sizes) for part in work.parts if isinstance(part, Picture))])


def _fine_rungs(work: Work) -> int:
    return max([1, *(part.n_fine for part in work.parts if isinstance(part, Picture))])


def _at_rung(picture: int | Picture, rung: int) -> int:
    assert isinstance(picture, Picture)
    return picture.sizes[min(rung, len(picture.sizes) - 1)]
