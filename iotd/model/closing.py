"""The end of a half answer: bytes behind which it is valid, found by trying.

Walks over bytes instead of tokens: which of them are allowed is known in microseconds. Knows no tokenizer.
"""

import heapq
from collections.abc import Sequence
from functools import cache
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

END = 256
"""Stands for the end of the answer among the bytes."""
MOST_TRIED = 1000
"""Bytes tried for one closing, at about 10 µs each."""
MOST_BYTES = 4096
"""Of a closing."""
WIDE = 32
"""Where more bytes are allowed than this, the place is inside of free text."""
IN_TEXT, IN_DIGITS, ELSE = b'"-', b"1", b'}]",0'
"""What seems best in free text: its end, or else what fills it; where a digit must follow, as in 0.1 where zero is too
little; and elsewhere: what ends a value, or else goes on to the next, or else is a short one."""
AT_FIRST = 4
"""Bytes that are tried at a place when it is first met; inside of free text, where all are much alike, one."""
STEP, DETOUR = 1 / 1024, 1 / 4
"""What each try costs, and what any but the first choice does: a way that leads nowhere is left after 256 tries."""


class Bytes:
    """The vocabulary of single bytes, as llguidance asks for it."""

    eos_token_id = END
    bos_token_id = None
    special_token_ids = (END,)
    tokens = (*(bytes([byte]) for byte in range(END)), b"")

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@cache
def byte_tokenizer() -> "LLTokenizer":
    """The tokenizer of the matchers that are walked here."""
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(Bytes()), slices=[])


def closes(walk: "LLMatcher", data: bytes) -> bool:
    """Whether the answer may end behind these bytes. The walk stays where it is."""
    if not data:
        return walk.is_accepting()
    return walk.validate_tokens([*data, END]) == len(data) + 1


def find_closing(walk: "LLMatcher", known: bytes = b"", words: Sequence[bytes] = ()) -> bytes | None:
    """A short closing, mostly the shortest; None where none is found soon. The walk stays where it is.

    known: a closing from before the last bytes. Mostly it still holds; or its end does, soon behind. words: what the
    format may want to stand in free text, which would not be found byte by byte.

    The search follows what looks best, and the longer that leads nowhere, the sooner it tries another way: limited
    discrepancy search (Harvey and Ginsberg, 1995) with a price on length, so that no loop holds it.
    """
    if closes(walk, known):
        return known
    at, path = _advanced(walk, b"")
    if at.is_accepting():
        return path
    order = count()
    heap: list[tuple[float, int, bytes, LLMatcher, Sequence[bytes]]] = [(0.0, next(order), path, at, ())]
    seen: set[tuple[int, bytes]] = set()
    tried = 0
    while heap and tried < MOST_TRIED:
        cost, _, path, at, ways = heapq.heappop(heap)
        price, detour = STEP, 0.0
        if not ways:
            allowed = _allowed(at)
            if (len(path), allowed) in seen:
                continue  # of ways of one length to places that look alike, one is enough
            seen.add((len(path), allowed))
            for start in range(len(known) - 1, -1, -1):
                if known[start] in allowed and closes(at, known[start:]):
                    return path + known[start:]
            ways, others = _ways(allowed, words)
            price, detour = STEP * len(ways), DETOUR
            if others:
                heapq.heappush(heap, (cost + detour, next(order), path, at, others))
        steps = [_advanced(at, way) for way in ways]
        tried += len(steps)
        if ends := [path + data for after, data in steps if after.is_accepting()]:
            return min(ends, key=len)
        for rank, (after, data) in enumerate(steps):
            if not after.is_error() and len(path) + len(data) <= MOST_BYTES:
                dearer = cost + price + (detour if rank else 0)
                heapq.heappush(heap, (dearer, next(order), path + data, after, ()))
    return None


def _advanced(walk: "LLMatcher", data: bytes) -> tuple["LLMatcher", bytes]:
    """A copy of the walk behind these bytes and those that must follow them, with all of them."""
    after = walk.deep_copy()
    after.consume_tokens(list(data))
    forced = after.compute_ff_bytes()[:MOST_BYTES]
    after.consume_tokens(list(forced))
    return after, data + forced


def _allowed(walk: "LLMatcher") -> bytes:
    mask = np.frombuffer(walk.compute_bitmask(), np.uint8)
    return bytes(np.flatnonzero(np.unpackbits(mask, bitorder="little")[:END]).tolist())


def _ways(allowed: bytes, words: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
    """What to try first at a place, and what later."""
    free = len(allowed) > WIDE
    preferred = IN_TEXT if free else IN_DIGITS if allowed.isdigit() else ELSE
    best_first = sorted(allowed, key=lambda byte: preferred.find(byte) % END)
    ways = [bytes([byte]) for byte in best_first]
    n_first = 1 if free else AT_FIRST
    return ways[:n_first], ways[n_first:] + [*words] * free
