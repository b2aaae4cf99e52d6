"""How well budgets were kept: figures of one load, out of what the client saw of its asks. Knows no clock."""

import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from iotd.demo.evaluate import Score
from iotd.events import CostStatus, FinishReason, Plan, Timings, Usage

REFUSED = "RESOURCE_EXHAUSTED"
ENOUGH_PIECES = 4
"""About as many tokens: of an answer in words that is some use."""
N_BINS = 6
THIRDS = ("before", "during", "after")
"""Of a load's time; a hog runs in the middle one."""

_SENTENCE = re.compile(r"((?<!\d)\.|[!?])[\"'”’)\]*]*(\s|\Z)|[。！？\n]")
"""A sentence's end. Behind a digit a point may be a decimal one, whose digits are still to come."""
_SENTENCE_LAST = re.compile(rf"({_SENTENCE.pattern})\s*\Z")
_BROKEN_OFF = re.compile(r"(…|\.\.\.)\s*\Z")


@dataclass(slots=True)
class Again:
    """What had come by its first deadline of an ask that was refused and at once sent again, with time enough."""

    pieces: int = 0
    sentence: bool = False
    whole: bool = False

    def useful(self, form: str) -> bool:
        """Whether that would have been an answer: some words, or all of one that has to keep to a form."""
        return self.whole or (form == "free" and (self.sentence or self.pieces >= ENOUGH_PIECES))


@dataclass(slots=True)
class Asked:
    """One ask as the client saw it: its times are seconds from just before it was sent, on the client's clock."""

    kind: str
    form: str
    question: str
    budget_s: float
    max_tokens: int
    due_s: float
    """When it was to be sent, since the load began."""
    lag_s: float = 0.0
    """How much later than that it was sent."""
    request_id: str = ""
    queue_position: int = 0
    plan: Plan | None = None
    accepted_s: float | None = None
    first_s: float | None = None
    """The first text."""
    end_s: float = 0.0
    """The answer's end, or the error."""
    error: str = ""
    """Its code; empty where the answer ended well."""
    needed_s: float | None = None
    """The budget that a refusal asks for."""
    finish_reason: FinishReason | None = None
    text: str = ""
    usage: Usage | None = None
    timings: Timings | None = None
    right: bool | None = None
    """None where no answer could be right or wrong."""
    valid: bool | None = None
    """Of an answer that has to keep to a form."""
    again: Again | None = None

    @property
    def accepted(self) -> bool:
        return self.accepted_s is not None

    @property
    def refused(self) -> bool:
        return not self.accepted and self.error == REFUSED

    @property
    def in_time(self) -> bool:
        """The whole answer was there before its budget was over."""
        return not self.error and self.end_s <= self.budget_s

    @property
    def cut(self) -> bool:
        """There was more to say than the budget allowed."""
        return self.finish_reason is FinishReason.BUDGET

    @property
    def busy_s(self) -> tuple[float, float]:
        """From when to when it may have kept the engine busy, since the load began."""
        sent_s = self.due_s + self.lag_s
        return sent_s, sent_s + (self.budget_s if self.again else self.end_s)


@dataclass(frozen=True, slots=True)
class Share:
    """How many of a group."""

    n: int
    of: int

    @property
    def part(self) -> float:
        return self.n / self.of if self.of else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Of the part, at 95 %."""
        return Score(self.of, self.n).interval


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of what was measured."""

    n: int
    mean: float
    p50: float
    p95: float
    p99: float
    most: float


@dataclass(frozen=True, slots=True)
class Bin:
    """The asks whose budgets were from low_s to high_s."""

    low_s: float
    high_s: float
    refused: Share
    in_time: Share
    """Of those accepted."""
    whole_sentences: Share
    right: Share
    right_cut: Share
    """The same where every answer in words is cut at a fixed number of tokens. Of none where that was not tried."""
    used: Spread | None
    """The part of the budget that was used where there was more to say."""

    @property
    def middle_s(self) -> float:
        return math.sqrt(self.low_s * self.high_s)


@dataclass(frozen=True, slots=True)
class LoadScore:
    """The figures of one load. Times are in seconds; parts are of 1."""

    load: float
    """Arriving work as a part of what can be done."""
    rate_hz: float
    asks: int
    accepted: int
    accepted_s: Spread | None
    """How soon."""
    refused: Share
    errors: dict[str, int]
    """By code: asks that were accepted and failed, or failed otherwise than by a refusal."""
    in_time: Share
    """Of those accepted."""
    late_s: Spread | None
    """By how much the accepted ones ended after their budgets."""
    late_steps: Spread | None
    """The same in decode steps."""
    used: Spread | None
    """The part of the budget that was used where there was more to say."""
    used_alone: Spread | None
    """Of these, by asks that met an idle engine, and had ended when the next one came."""
    whole_sentences: Share
    """Answers in words that the budget cut off, and that end with a sentence."""
    broken_off: Share
    """Of the same, those that say with an ellipsis that they do not."""
    whole_answers: Share
    """All answers in words, whether or not they were cut off, that end whole."""
    valid: Share
    """Answers that had to keep to a form."""
    right: Share
    """Answers that were right and in time, of all asks that could have been answered rightly, refused ones too."""
    right_of_accepted: Share
    right_cut: Share
    """`right` where every answer in words is cut at a fixed number of tokens. Of none where that was not tried."""
    refused_s: Spread | None
    """How soon a refusal came."""
    refused_wrongly: Share
    """Refused asks that were useful in time when sent again, of those sent again."""
    predicted_error: Spread | None
    """How far the plan's time was off, as a part of what it took: of answers that have as many tokens as planned."""
    lag_s: Spread | None
    """By how much the client itself was late to send."""
    costs: CostStatus
    """The daemon's own word about its predictions, at the end of the load."""
    thirds: dict[str, Share] = field(default_factory=dict)
    """`in_time` of those sent before, during and after a hog; empty where there was none."""
    bins: tuple[Bin, ...] = ()


def score(
    asked: Sequence[Asked],
    *,
    load: float,
    rate_hz: float,
    step_s: float,
    budgets_s: tuple[float, float],
    costs: CostStatus,
    cut: Sequence[Asked] = (),
    hog_s: tuple[float, float] | None = None,
) -> LoadScore:
    """All figures. cut: the asks of the pass with a fixed cut. hog_s: from when to when a hog ran, as `due_s`."""
    accepted = [a for a in asked if a.accepted]
    late_s = [max(0.0, a.end_s - a.budget_s) for a in accepted]
    more = [a for a in accepted if a.cut]
    refused = [a for a in asked if a.refused]
    return LoadScore(
        load=load,
        rate_hz=rate_hz,
        asks=len(asked),
        accepted=len(accepted),
        accepted_s=spread(a.accepted_s for a in accepted),
        refused=Share(len(refused), len(asked)),
        errors=dict(Counter(a.error for a in asked if a.error and not a.refused)),
        in_time=share(accepted, lambda a: a.in_time),
        late_s=spread(late_s),
        late_steps=spread(late / step_s for late in late_s),
        used=spread(a.end_s / a.budget_s for a in more),
        used_alone=spread(a.end_s / a.budget_s for a in alone(asked) if a.cut),
        whole_sentences=_whole_sentences(more),
        broken_off=share((a for a in more if a.form == "free"), lambda a: breaks_off(a.text)),
        whole_answers=share((a for a in accepted if a.form == "free" and not a.error), _whole),
        valid=share((a for a in accepted if a.valid is not None), lambda a: bool(a.valid)),
        right=_right(asked),
        right_of_accepted=_right(accepted),
        right_cut=_right(cut),
        refused_s=spread(a.end_s for a in refused),
        refused_wrongly=share((a for a in refused if a.again), lambda a: bool(a.again and a.again.useful(a.form))),
        predicted_error=spread(map(_predicted_error, accepted)),
        lag_s=spread(a.lag_s for a in asked),
        costs=costs,
        thirds=_thirds(accepted, hog_s) if hog_s else {},
        bins=_bins(asked, cut, budgets_s),
    )


def alone(asked: Iterable[Asked]) -> list[Asked]:
    """The asks during which there was no other."""
    busy = sorted((a for a in asked if a.accepted or a.again), key=lambda a: a.busy_s)
    free_s = [*itertools.accumulate((a.busy_s[1] for a in busy), max, initial=-math.inf)]
    next_s = [*(a.busy_s[0] for a in busy[1:]), math.inf]
    return [
        a
        for a, before_s, after_s in zip(busy, free_s, next_s, strict=False)
        if a.accepted and before_s <= a.busy_s[0] and a.busy_s[1] <= after_s
    ]


def share(group: Iterable[Asked], true: Callable[[Asked], bool]) -> Share:
    """Of how many it is true."""
    found = [true(each) for each in group]
    return Share(sum(found), len(found))


def spread(values: Iterable[float | None]) -> Spread | None:
    """Of those that are there; None where there are none.

    A percentile is the smallest value that so many of 100 do not exceed.
    """
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None

    def percentile(part: float) -> float:
        return ordered[math.ceil(part * len(ordered)) - 1]

    shown = map(percentile, (0.5, 0.95, 0.99, 1.0))
    return Spread(len(ordered), statistics.fmean(ordered), *shown)


def has_sentence(text: str) -> bool:
    """Whether a sentence has ended in it."""
    return _SENTENCE.search(text) is not None


def ends_with_sentence(text: str) -> bool:
    """Whether it ends with a whole sentence, or line; an ellipsis ends none."""
    return _SENTENCE_LAST.search(text) is not None and not breaks_off(text)


def breaks_off(text: str) -> bool:
    return _BROKEN_OFF.search(text) is not None


def _whole(asked: Asked) -> bool:
    return not asked.cut or ends_with_sentence(asked.text)


def _whole_sentences(more: Iterable[Asked]) -> Share:
    return share((a for a in more if a.form == "free"), lambda a: ends_with_sentence(a.text))


def _right(asked: Iterable[Asked]) -> Share:
    return share((a for a in asked if a.right is not None), lambda a: bool(a.right) and a.in_time)


def _predicted_error(asked: Asked) -> float | None:
    plan, usage, timings = asked.plan, asked.usage, asked.timings
    if not (plan and usage and timings and plan.answer_tokens and timings.total_s):
        return None
    if usage.generation_tokens != plan.answer_tokens + plan.thinking_tokens:
        return None
    return abs(plan.predicted.total_s - timings.total_s) / timings.total_s


def _thirds(accepted: Sequence[Asked], hog_s: tuple[float, float]) -> dict[str, Share]:
    begun = [sum(a.due_s >= border_s for border_s in hog_s) for a in accepted]
    return {
        name: share((a for a, which in zip(accepted, begun, strict=True) if which == n), lambda a: a.in_time)
        for n, name in enumerate(THIRDS)
    }


def _bins(asked: Sequence[Asked], cut: Sequence[Asked], budgets_s: tuple[float, float]) -> tuple[Bin, ...]:
    """Of equal width on a logarithmic scale; those that nothing is in are left out."""
    low, high = budgets_s
    edges_s = [low * (high / low) ** (n / N_BINS) for n in range(N_BINS + 1)]

    def binned(group: Sequence[Asked]) -> list[list[Asked]]:
        found: list[list[Asked]] = [[] for _ in range(N_BINS)]
        for a in group:
            found[min(sum(a.budget_s >= edge_s for edge_s in edges_s[1:]), N_BINS - 1)].append(a)
        return found

    return tuple(
        _bin(edges_s[n], edges_s[n + 1], own, own_cut)
        for n, (own, own_cut) in enumerate(zip(binned(asked), binned(cut), strict=True))
        if own
    )


def _bin(low_s: float, high_s: float, asked: Sequence[Asked], cut: Sequence[Asked]) -> Bin:
    accepted = [a for a in asked if a.accepted]
    more = [a for a in accepted if a.cut]
    return Bin(
        low_s=low_s,
        high_s=high_s,
        refused=share(asked, lambda a: a.refused),
        in_time=share(accepted, lambda a: a.in_time),
        whole_sentences=_whole_sentences(more),
        right=_right(asked),
        right_cut=_right(cut),
        used=spread(a.end_s / a.budget_s for a in more),
    )
