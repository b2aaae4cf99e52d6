"""How many tokens of the stream are read at once: as many as a question may be kept waiting for, by what runs cost.

Knows no model: it sees how long runs of how many tokens took.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

SEEN = 5
"""Runs of one size whose median is trusted: a stall of the machine is in one of them, a slower clock in all."""
ROOM = 0.75
"""A size whose runs take less than this part of the limit is raised; in between it stays."""


class Pace:
    """Keeps runs within `limit_s`, a token at least and `most` at most. One thread uses it."""

    def __init__(self, most: int, limit_s: float, clock: Callable[[], float]) -> None:
        self.size = most
        self._most = most
        self._limit_s = limit_s
        self._clock = clock
        self._took_s: deque[float] = deque(maxlen=SEEN)

    @contextmanager
    def run(self, n_tokens: int) -> Iterator[None]:
        """Around one run of so many tokens."""
        began_s = self._clock()
        yield
        self._learn(n_tokens, self._clock() - began_s)

    def _learn(self, n_tokens: int, took_s: float) -> None:
        if n_tokens > self.size or (n_tokens < self.size and took_s <= self._limit_s):
            return  # planned under another size, or an easy end of a line: it says nothing about this size
        self._took_s.append(took_s)
        usual_s = median(self._took_s)
        if took_s > 2 * self._limit_s and len(self._took_s) == 1 and n_tokens == self.size:
            self._set(self._limit_s / took_s)  # far off: the first runs after a start
        elif len(self._took_s) < SEEN:
            return
        elif usual_s > self._limit_s:
            self._set(self._limit_s / usual_s)
        elif usual_s < ROOM * self._limit_s and self.size < self._most:
            self._set(min(2.0, self._limit_s / max(usual_s, 1e-9)))

    def _set(self, factor: float) -> None:
        """To the size that fits if the time is in proportion to it; it is not quite, and the next runs correct that."""
        raised = int(self.size * factor)
        self.size = max(1, min(self._most, raised if raised != self.size else self.size + (1 if factor > 1 else -1)))
        self._took_s.clear()
