"""How well a coarse head finds the likeliest tokens, in hidden states that it was not made of.

Asked by the kernels and the code that the daemon runs.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iotd.model.head import MOST_ROWS, Coarse, Graph, Likely
from iotd.model.sampling import nth_largest

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
TOP = 20
TEMPERATURE = 0.7
LEAST_ODDS = 1e-6
"""With which a token counts that cannot be drawn and should be."""
MOST_FALLBACK = 0.04
MOST_WRONG = 5e-4
LEAST_TOP = 0.995
MOST_KL = 0.001


@dataclass(frozen=True, slots=True)
class Reference:
    """What the exact head says of hidden states."""

    hidden: Floats
    """float32 [m, D]"""
    tokens: Ints
    """int64 [m, TOP]: the rows with the largest logits, the largest first."""
    logits: Floats
    """float32 [m, TOP]: theirs."""

    @classmethod
    def of(cls, exact: Graph, hidden: Floats) -> "Reference":
        tokens = np.empty((len(hidden), min(TOP, exact.n_rows)), np.int64)
        values = np.empty(tokens.shape, np.float32)
        for start in range(0, len(hidden), MOST_ROWS):
            for n, logits in enumerate(exact.run(hidden[start : start + MOST_ROWS]), start):
                top = np.argpartition(logits, -tokens.shape[1])[-tokens.shape[1] :]
                tokens[n] = top[np.argsort(-logits[top], kind="stable")]
                values[n] = logits[tokens[n]]
        return cls(hidden, tokens, values)


class Tally:
    """What was found so far."""

    def __init__(self) -> None:
        self.n_states = 0
        self.n_sure = 0
        self.n_right = 0
        """Sure, and of the same likeliest token."""
        self.n_far = 0
        """Sure, and the likeliest token was not even among half as many candidates: how near it comes to be wrong."""
        self._included = 0.0
        self._kl = 0.0

    def add(self, found: Likely, far: bool, tokens: Ints, logits: Floats) -> None:
        """tokens, logits: of the exact head, [TOP]."""
        self.n_states += 1
        if not found.sure:
            return
        self.n_sure += 1
        self.n_right += bool(found.rows[found.logits.argmax()] == tokens[0])
        self.n_far += far
        at = np.searchsorted(found.rows, tokens).clip(max=len(found.rows) - 1)
        there = found.rows[at] == tokens
        self._included += float(there.mean())
        self._kl += divergence(logits, np.where(there, found.logits[at], -np.inf), found.logits)

    @property
    def fallback(self) -> float:
        return 1 - self.n_sure / self.n_states

    @property
    def argmax(self) -> float:
        return self.n_right / self.n_sure if self.n_sure else 1.0

    @property
    def top(self) -> float:
        return self._included / self.n_sure if self.n_sure else 1.0

    @property
    def kl(self) -> float:
        return self._kl / self.n_states

    def failures(self, n_states: int) -> int:
        """Limits that are passed, whatever comes: of so many states in all."""
        passed = (
            self.n_states - self.n_sure > MOST_FALLBACK * n_states,
            max(self.n_sure - self.n_right, self.n_far) > MOST_WRONG * n_states,
            self.n_sure * (1 - self.top) > (1 - LEAST_TOP) * n_states,
            self.kl * self.n_states > MOST_KL * n_states,
        )
        return sum(passed)


def tally(coarse: Coarse, graph: Graph, reference: Reference, *, whole: bool = False) -> Tally:
    """Judge by all states; unless `whole`, no further than up to the first limit that is passed."""
    found = Tally()
    n_states = len(reference.hidden)
    for n, hidden in enumerate(reference.hidden):
        logits = graph.run(hidden[None])[0]
        half = nth_largest(logits, max(1, coarse.candidates // 2))
        far = bool(logits[reference.tokens[n, 0]] < half)
        found.add(coarse.settle(hidden, logits), far, reference.tokens[n], reference.logits[n])
        if not whole and found.failures(n_states):
            break
    return found


def divergence(expected: Floats, given: Floats, drawn: Floats) -> float:
    """Of what is drawn from: from the exact head's distribution to another's.

    expected, given: the logits of the exact head's TOP tokens by both, the largest first; −∞ for what the other lacks.
    drawn: all logits of the other.
    """
    best = np.partition(drawn, -len(given))[-len(given) :].astype(np.float64)
    odds = np.exp((expected.astype(np.float64) - expected[0]) / TEMPERATURE)
    odds /= odds.sum()
    others = np.exp((given - best.max()) / TEMPERATURE) / np.exp((best - best.max()) / TEMPERATURE).sum()
    return float((odds * np.log(odds / np.maximum(others, LEAST_ODDS))).sum())
