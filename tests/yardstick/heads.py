"""The head as conversion chooses it, on the hidden states of the texts: what the daemon would draw from.

Knows no text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict

import msgspec
import numpy as np
from numpy.typing import NDArray

from iotd.convert.coarse import HiddenStates
from iotd.convert.head import write_head
from iotd.convert.random import random_config
from iotd.convert.rounding import Rounding
from iotd.convert.spec import spec_from_config
from iotd.convert.weights import Matrix
from iotd.model.head import MOST_ROWS, Head
from iotd.model.session import Threads, open_session
from iotd.model.spec import ModelSpec

Floats = NDArray[np.float32]
TOP = 20
TEMPERATURE = 0.7
LEAST = 1e-6
"""The probability that a token which cannot be drawn counts with."""


class HeadFigures(TypedDict):
    """Against the exact head of the same package. Where conversion chose that, all states fall back to it."""

    argmax: float
    """How often the likeliest token is the same, in states that do not fall back."""
    top20: float
    """Of the 20 likeliest tokens, those that have a logit in such a state."""
    kl: float
    """Of the distribution that is drawn from (temperature 0.7, top_k 20), nats, over all states."""
    fallback: float
    """Part of the states."""


class StoredHead:
    """A recipe's head, written as conversion writes it."""

    def __init__(self, matrix: Matrix, rounding: Rounding, calibrated: HiddenStates | None, folder: Path) -> None:
        """matrix: [V, D]. calibrated: what a coarse head is made of; None where there is no calibration."""
        spec = _spec(matrix)
        entry = write_head(folder, spec, _Table(matrix), rounding, None, calibrated)
        opened = partial(open_session, threads=Threads.of_all_cores())
        self._exact = Head(folder, entry, spec, opened, "exact")
        self._chosen = Head(folder, entry, spec, opened, "auto")

    def logits(self, hidden: Floats) -> Floats:
        """All of them: float32 [R, D] → [R, V]."""
        starts = range(0, len(hidden), MOST_ROWS)
        return np.concatenate([self._exact.logits(hidden[start : start + MOST_ROWS]).copy() for start in starts])

    def figures(self, hidden: Floats) -> HeadFigures:
        """Of states float32 [n, D]."""
        if self._chosen.kind == "exact":
            return HeadFigures(argmax=1.0, top20=1.0, kl=0.0, fallback=1.0)
        found = [*self._compared(hidden)]
        settled = [each for each in found if not each.fallback]
        return HeadFigures(
            argmax=float(np.mean([each.same for each in settled])) if settled else 1.0,
            top20=float(np.mean([each.top for each in settled])) if settled else 1.0,
            kl=float(np.mean([each.kl for each in found])),
            fallback=1 - len(settled) / len(found),
        )

    def _compared(self, hidden: Floats) -> Iterator["State"]:
        for start in range(0, len(hidden), MOST_ROWS):
            states = hidden[start : start + MOST_ROWS]
            yield from map(State.of, self._exact.logits(states).copy(), self._chosen.logits(states))


@dataclass(frozen=True, slots=True)
class State:
    """What the chosen head makes of one hidden state, beside the exact one."""

    fallback: bool
    same: bool
    top: float
    kl: float

    @classmethod
    def of(cls, exact: Floats, found: Floats) -> "State":
        """exact: float32 [V]. found: the same, −∞ for a token whose logit was not asked for."""
        if np.isfinite(found).all():
            return cls(True, True, 1.0, 0.0)
        top = np.argpartition(exact, -TOP)[-TOP:]
        expected, given = _drawn(exact), _drawn(found)
        kl = sum(p * np.log(p / max(given.get(token, 0.0), LEAST)) for token, p in expected.items())
        return cls(False, bool(exact.argmax() == found.argmax()), float(np.isfinite(found[top]).mean()), float(kl))


def _drawn(logits: Floats) -> dict[int, float]:
    """The probabilities of the tokens that may be drawn."""
    top = np.argpartition(logits, -TOP)[-TOP:]
    odds = np.exp((logits[top].astype(np.float64) - logits.max()) / TEMPERATURE)
    return dict(zip(top.tolist(), (odds / odds.sum()).tolist(), strict=True))


def _spec(matrix: Matrix) -> ModelSpec:
    """Of any model with such a table, which is its head, too."""
    some = spec_from_config(random_config("tiny"), None, tied=True, vision=False)
    return msgspec.structs.replace(some, vocab_size=matrix.rows, hidden_size=matrix.columns)


@dataclass(frozen=True, slots=True)
class _Table:
    """A checkpoint's weights, of which the head asks for the table only."""

    embedding: Matrix

    def tensor(self, name: str, *shape: int) -> Floats:
        raise NotImplementedError(name)

    def matrix(self, name: str, rows: int, columns: int, *, again: bool = False) -> Matrix:
        return self.embedding
