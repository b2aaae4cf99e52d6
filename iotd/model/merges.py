"""Byte-pair merging of one word over memory-mapped tables.

Knows token ids and ranks; knows no text.
"""

from bisect import bisect_left
from heapq import heapify, heappop, heappush

from iotd.model.tokenizer_file import Table

_NONE = -1
_POSITION = (1 << 32) - 1


class Merges:
    """Pairs of neighbouring tokens that join, the lowest rank first.

    The pairs lie sorted by (left, right): those of one left token are `rights[starts[left]:starts[left + 1]]`, with
    their ranks beside them. `products[rank]` is what a pair becomes.
    """

    def __init__(self, starts: Table, rights: Table, ranks: Table, products: Table) -> None:
        self._starts = starts
        self._rights = rights
        self._ranks = ranks
        self._products = products

    def rank(self, left: int, right: int) -> int:
        """The pair's rank, or -1 where it does not merge."""
        end = self._starts[left + 1]
        at = bisect_left(self._rights, right, self._starts[left], end)
        return self._ranks[at] if at < end and self._rights[at] == right else _NONE

    def apply(self, tokens: list[int]) -> list[int]:
        """Merge a word to the end, of equal ranks the leftmost first, in O(n log n).

        A linked list over positions, with a heap of `rank << 32 | position`. `pending[i]` is the rank of the pair at i
        as it is now, which tells a stale heap entry from a good one: every pair has a rank of its own.
        """
        n = len(tokens)
        if n < 2:
            return tokens
        ids = tokens.copy()
        after = list(range(1, n + 1))
        before = list(range(-1, n - 1))
        pending = [self.rank(ids[i], ids[i + 1]) for i in range(n - 1)] + [_NONE]
        heap = [rank << 32 | i for i, rank in enumerate(pending) if rank != _NONE]
        heapify(heap)
        while heap:
            entry = heappop(heap)
            rank, i = entry >> 32, entry & _POSITION
            if pending[i] != rank:
                continue
            gone = after[i]
            ids[i], ids[gone] = self._products[rank], _NONE
            pending[gone] = pending[i] = _NONE
            after[i] = after[gone]
            if after[i] < n:
                before[after[i]] = i
            for left in (before[i], i):
                if left < 0 or after[left] >= n:
                    continue
                pending[left] = rank = self.rank(ids[left], ids[after[left]])
                if rank != _NONE:
                    heappush(heap, rank << 32 | left)
        return [token for token in ids if token != _NONE]
