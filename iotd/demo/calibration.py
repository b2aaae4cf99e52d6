"""Whether the probabilities of two labels are true on the whole: of all answers said to be 80 % sure, are 80 % right?

Expected calibration error and temperature as in Guo et al., On Calibration of Modern Neural Networks (2017). Knows no
model and no question.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

N_BINS = 10
TEMPERATURES = [2 ** (n / 20) for n in range(-40, 41)]
"""From a quarter to 4: one that few questions make look best lies in no likelier place beyond."""


@dataclass(frozen=True, slots=True)
class Case:
    """One question that was answered by the likelier of two labels."""

    margin: float
    """Of its log probability over the other's, 0 or more."""
    right: bool

    def confidence(self, temperature: float) -> float:
        """The label's probability, from 0.5 to 1."""
        return 1 / (1 + math.exp(-self.margin / temperature))


@dataclass(frozen=True, slots=True)
class Calibration:
    """How true the probabilities are."""

    asked: int
    right: int
    error: float
    """Expected calibration error at temperature 1, from 0 to 1."""
    temperature: float
    """With which the error of every other question is smallest."""
    rest_error: float
    """Of the rest of the questions, at temperature 1."""
    rest_error_at_temperature: float


def calibration(cases: Sequence[Case]) -> Calibration | None:
    """None of fewer than two."""
    fitted, rest = cases[::2], cases[1::2]
    if not rest:
        return None
    # Where several are as good, the one that changes least.
    temperature = min(TEMPERATURES, key=lambda t: (expected_error(fitted, t), abs(math.log(t))))
    return Calibration(
        asked=len(cases),
        right=sum(case.right for case in cases),
        error=expected_error(cases, 1.0),
        temperature=temperature,
        rest_error=expected_error(rest, 1.0),
        rest_error_at_temperature=expected_error(rest, temperature),
    )


def expected_error(cases: Sequence[Case], temperature: float) -> float:
    """Mean difference of confidence and accuracy in bins of equal width, weighted by their cases; one case or more."""
    off = [0.0] * N_BINS
    for case in cases:
        confidence = case.confidence(temperature)
        off[min(int(confidence * N_BINS), N_BINS - 1)] += confidence - case.right
    return sum(map(abs, off)) / len(cases)
