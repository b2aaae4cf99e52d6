"""Prose, packed into sequences: pieces of passages, taken in turn from groups such as registers or languages."""

import random
from collections import deque
from collections.abc import Iterator, Mapping

from iotd.convert.samples.blocks import LANGUAGES, Part, read_blocks
from iotd.model.tokenizer import Tokenizer

Groups = Mapping[str, list[str]]

_LEAST_TOKENS = 96
"""Of a piece, where its passage has as many."""
_ENDS = tuple(end.encode() for end in (".", "!", "?", "。", "！", "？", "\n"))
_BREAK = "\n\n"


def registers(part: Part) -> Groups:
    """English passages by their register, such as `recipe`."""
    groups: dict[str, list[str]] = {}
    for (register, *_), passage in read_blocks(part, "en"):
        groups.setdefault(register, []).append(passage)
    return groups


def languages(part: Part) -> Groups:
    """Passages of the other languages."""
    return {language: [passage for _, passage in read_blocks(part, language)] for language in LANGUAGES}


def packed(
    groups: Groups, tokenizer: Tokenizer, rng: random.Random, *, n_sequences: int, length: int
) -> Iterator[list[int]]:
    """At most so many sequences of `length` tokens, as far as the passages reach. All groups have a like share."""
    share = n_sequences * length // len(groups)
    ids: list[int] = []
    pieces = _pieces(groups, tokenizer, rng, min(length, max(share, _LEAST_TOKENS)))
    for _ in range(n_sequences):
        while len(ids) < length:
            piece = next(pieces, None)
            if piece is None:
                return
            ids += piece
        yield ids[:length]
        ids = ids[length:]


def _pieces(groups: Groups, tokenizer: Tokenizer, rng: random.Random, most: int) -> Iterator[list[int]]:
    """From each group in turn the beginning of a passage; what it leaves of the passage comes when all have begun."""
    gap = tokenizer.encode(_BREAK)
    queues = [deque[str | list[int]](rng.sample(passages, len(passages))) for passages in groups.values()]
    rng.shuffle(queues)
    while queues:
        for queue in queues:
            passage = queue.popleft()
            ids = tokenizer.encode(passage + _BREAK) if isinstance(passage, str) else passage
            end = _end(ids, tokenizer, most)
            if ids[end:]:
                queue.append(ids[end:])
            yield ids[:end] + (gap if ids[end:] else [])
        queues = [queue for queue in queues if queue]


def _end(ids: list[int], tokenizer: Tokenizer, most: int) -> int:
    """Where a piece of at most so many tokens ends: with a sentence, if one ends in its second half."""
    if len(ids) <= most:
        return len(ids)
    ends = (end for end in range(most, most // 2, -1) if tokenizer.token_bytes(ids[end - 1]).endswith(_ENDS))
    return next(ends, most)
