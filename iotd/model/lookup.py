"""Drafts of what an answer says next: where its last tokens stood before, what followed them there may follow again.

Answers quote: readings, names, their own words (prompt lookup decoding, A. Saxena, 2023). A draft costs nothing to
make, and is worth what the model makes of it.
"""

from collections.abc import Iterable, Sequence

import numpy as np

LEAST, MOST = 2, 16
"""Tokens at the end that must have stood together before, and that are compared at most."""


class Lookup:
    """All that was said so far."""

    def __init__(self, said: Iterable[int] = ()) -> None:
        self._said = np.fromiter(said, np.int32)
        self._n = len(self._said)

    def extend(self, tokens: Sequence[int]) -> None:
        if self._n + len(tokens) > len(self._said):
            self._said = np.concatenate([self._said[: self._n], np.zeros(self._n + len(tokens) + 64, np.int32)])
        self._said[self._n : self._n + len(tokens)] = tokens
        self._n += len(tokens)

    def draft(self, most: int) -> list[int]:
        """What may come next: at most so many tokens, from the longest and latest match; none where there is none."""
        said = self._said[: self._n]
        ends = np.arange(LEAST, self._n)
        found = None
        for back in range(1, min(MOST, self._n) + 1):
            ends = ends[ends >= back]
            ends = ends[said[ends - back] == said[-back]]
            if not len(ends):
                break
            if back >= LEAST:
                found = int(ends[-1])
        return [] if found is None else said[found : found + most].tolist()
