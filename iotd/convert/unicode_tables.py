"""Asks the reference tokenizer for its Unicode: character classes, and the characters its normalisation knows.

The regular expressions and the normalisation of `tokenizers` have tables of two different versions (16 and about 10 in
0.23), and neither is Python's; a package carries what the reference does. Knows no vocabulary.
"""

from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, normalizers, pre_tokenizers

from iotd.model.pretokenizer import KINDS

_UNASSIGNED = 0x40000
_TAGS = range(0xE0000, 0xE1000)
"""Planes 4 to 13 are unassigned and 15 to 16 private; plane 14 holds tags and variation selectors at its start."""
_SURROGATES = range(0xD800, 0xE000)
_NOT_OF_CLASS = {"L": r"[^\p{L}]+", "M": r"[^\p{M}]+", "N": r"[^\p{N}]+", "S": r"\S+"}


@cache
def character_classes() -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """First code points of the runs of one class (uint32, ascending from 0), and those classes (uint8, into KINDS)."""
    points = _points()
    text = "".join(map(chr, points))
    kinds = np.zeros(_TAGS.stop + 1, np.uint8)
    for kind, others in _NOT_OF_CLASS.items():
        split = pre_tokenizers.Split(Regex(others), "removed")
        for _, (start, end) in split.pre_tokenize_str(text):
            kinds[points[start:end]] = KINDS.index(kind)
    starts = np.flatnonzero(np.diff(kinds, prepend=255))
    return starts.astype(np.uint32), kinds[starts]


@cache
def normalized_ranges() -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Inclusive ranges (uint32) of the code points that the reference's normalisation changes, reorders or composes."""
    decompose = normalizers.NFD().normalize_str
    points = [point for point in _points() if point not in (0x0A, 0x0D)]
    lines = decompose("\n".join(map(chr, points))).split("\n")
    taking_part = {ord("\u0345")}
    for point, line in zip(points, lines, strict=True):
        if line != chr(point):
            taking_part.update([point, *map(ord, line)])
    # A mark changes places with one of the neighbours, which have the highest and the lowest combining class.
    lines = decompose("\n".join(f"\u0345{chr(point)}\u0334" for point in points)).split("\n")
    taking_part.update(point for point, line in zip(points, lines, strict=True) if line[0] != "\u0345")
    return _ranges(sorted(taking_part))


def _points() -> list[int]:
    return [point for point in range(_UNASSIGNED) if point not in _SURROGATES] + list(_TAGS)


def _ranges(points: list[int]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    gaps = [(here, following) for here, following in pairwise(points) if following != here + 1]
    starts = [points[0], *(following for _, following in gaps)]
    ends = [*(here for here, _ in gaps), points[-1]]
    return np.array(starts, np.uint32), np.array(ends, np.uint32)
