"""How long to wait before the next attempt to reach the broker. Pure: whoever waits brings the clock."""

import random


class Backoff:
    """Doubles from `first_s` to `most_s`, each time drawn from the upper half, so that many clients spread out.

    "Equal jitter", after M. Brooker, Exponential Backoff And Jitter (AWS Architecture Blog, 2015).
    """

    def __init__(self, first_s: float, most_s: float, rng: random.Random | None = None) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._rng = rng or random.Random()
        self._n_failures = 0

    def next_s(self) -> float:
        ceiling_s = min(self._most_s, self._first_s * 2.0 ** min(self._n_failures, 32))
        self._n_failures += 1
        return self._rng.uniform(ceiling_s / 2, ceiling_s)

    def slow_s(self) -> float:
        """The longest wait, for what only a person can mend, such as a wrong password."""
        return self._rng.uniform(self._most_s / 2, self._most_s)

    def reset(self) -> None:
        self._n_failures = 0
