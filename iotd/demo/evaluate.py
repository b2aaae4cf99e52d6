"""Asks about homes that no training has seen, judges the answers, and counts them kind by kind.

Knows neither how the model is reached (see `respondents`) nor how the result is shown.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from iotd.demo.calibration import Case
from iotd.demo.examples import HELD_OUT_SEED, Asked, Event, Heard, Pace, Seen, conversation
from iotd.demo.questions import KIND_WEIGHTS, Question

PACE = Pace(events=(4, 18), questions=(6, 9), frames=0.12, mischief=0.03)
HOME_EVENTS = 34
"""Readings and frames of one home at most: about 700 tokens, as long as the conversations of the training."""
SEEDS_OF_A_HOME = 1000
"""Each question about a home has its own, unless there are more."""
YES_NO = ("Yes", "No")
"""How the answer to a question for one of the two begins, unless it is to be JSON."""
Z_95 = 1.959964
"""Of the normal distribution: 95 % lie within so many standard deviations."""


class Respondent(Protocol):
    """A model that reads the stream of one home after the other, and answers questions about it."""

    def begin(self) -> None:
        """A home begins: nothing has been read."""

    def read(self, event: Heard | Seen) -> None:
        """Returns once the answers rest on it."""

    def answer(self, question: str, seed: int | None = None) -> str:
        """The most likely answer; with a seed the one that it draws, as a daemon does by default.

        What is read and asked later is not changed by it.
        """

    def weigh(self, question: str, labels: Sequence[str]) -> list[float]:
        """Natural logarithms of the probabilities with which the answer begins with each label."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One question, and what became of it."""

    home: int
    """The home's seed."""
    index: int
    """Counted from 0 in each home. The same home and index is the same question in every run."""
    kind: str
    question: str
    answer: str
    expected: str
    right: bool
    drawn: str
    """The answer as a daemon draws it by default, with a seed that is the same in every run."""
    drawn_right: bool
    mischief: bool
    """A payload that is no reading was heard before it, since the home began."""
    yes_no: tuple[float, float] | None = None
    """Log probabilities with which the answer begins with `Yes` and `No`; None where it should begin with neither."""

    @property
    def case(self) -> Case | None:
        """Of answering by the likelier of yes and no."""
        if self.yes_no is None:
            return None
        yes, no = self.yes_no
        return Case(abs(yes - no), right=(yes > no) == self.expected.startswith(YES_NO[0]))


@dataclass(frozen=True, slots=True)
class Score:
    """How many of a group of questions were answered rightly."""

    asked: int
    right: int

    @property
    def accuracy(self) -> float:
        return self.right / self.asked if self.asked else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Of the accuracy, at 95 % (E. B. Wilson, 1927)."""
        if not self.asked:
            return 0.0, 1.0
        n, p, z2 = self.asked, self.accuracy, Z_95**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = Z_95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)

    @property
    def figures(self) -> dict[str, object]:
        """All of it, for a script."""
        return {"asked": self.asked, "right": self.right, "accuracy": self.accuracy, "interval": self.interval}


def home(seed: int) -> Iterator[Event]:
    """What happens in one home, from its beginning to its last question."""
    return _shortened(conversation(seed, PACE, epoch_s=_midnight_s(seed)))


def ask(respondent: Respondent, n_questions: int, *, one_home: bool = False) -> Iterator[Outcome]:
    """Ask the first so many questions of the held-out set. Raises what the respondent raises.

    one_home: all about the first home, which goes on for as long as it takes: of one whose context is not at hand.
    """
    return itertools.islice(_endless(respondent, one_home), n_questions)


def by_kind(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Of every kind that was asked, in the order of the demo's repertoire."""
    found = {kind: [outcome for outcome in outcomes if outcome.kind == kind] for kind in KIND_WEIGHTS}
    return {kind: of_kind for kind, of_kind in found.items() if of_kind}


def score(outcomes: Iterable[Outcome], *, drawn: bool = False) -> Score:
    """Of the likeliest answers, or of those that were drawn."""
    rights = [outcome.drawn_right if drawn else outcome.right for outcome in outcomes]
    return Score(len(rights), sum(rights))


def _endless(respondent: Respondent, one_home: bool) -> Iterator[Outcome]:
    if one_home:
        seed = HELD_OUT_SEED
        yield from _outcomes(respondent, seed, conversation(seed, PACE, epoch_s=_midnight_s(seed)))
    for seed in itertools.count(HELD_OUT_SEED):
        yield from _outcomes(respondent, seed, home(seed))


def _outcomes(respondent: Respondent, seed: int, events: Iterable[Event]) -> Iterator[Outcome]:
    respondent.begin()
    index, mischief = 0, False
    for event in events:
        if isinstance(event, Asked):
            yield _outcome(respondent, event.question, seed, index, mischief)
            index += 1
        else:
            mischief = mischief or (isinstance(event, Heard) and not event.report.says)
            respondent.read(event)


def _outcome(respondent: Respondent, question: Question, seed: int, index: int, mischief: bool) -> Outcome:
    answer = respondent.answer(question.text)
    drawn = respondent.answer(question.text, seed * SEEDS_OF_A_HOME + index)
    yes_no: tuple[float, float] | None = None
    if question.yes_or_no:
        yes, no = respondent.weigh(question.text, YES_NO)
        yes_no = yes, no
    return Outcome(
        home=seed,
        index=index,
        kind=question.kind,
        question=question.text,
        answer=answer,
        expected=question.answer,
        right=question.right(answer),
        drawn=drawn,
        drawn_right=question.right(drawn),
        mischief=mischief,
        yes_no=yes_no,
    )


def _shortened(events: Iterator[Event]) -> Iterator[Event]:
    """Up to the last question before there are too many readings and frames; what follows it is left out."""
    waiting: list[Event] = []
    n_events = 0
    for event in events:
        if isinstance(event, Asked):
            yield from waiting
            yield event
            waiting = []
            continue
        n_events += 1
        if n_events > HOME_EVENTS:
            return
        waiting.append(event)


def _midnight_s(seed: int) -> float:
    """Any day of the years that the training has."""
    return 86400.0 * (15000 + seed % 10000)
