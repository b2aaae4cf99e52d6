"""Cuts text into the words that are merged separately, as the checkpoint's regular expression would.

Knows no token. Python's `re` has no `\\p{L}`, so each character is first mapped to one ASCII sign of its class, and a
translated pattern runs over that string. The classes come from a table: those of Python's `unicodedata` depend on the
interpreter's version and are older than the ones the reference uses.
"""

import re
from bisect import bisect_right
from typing import Final

from iotd.model.tokenizer_file import Table

KINDS: Final = "OLMNS"
"""Classes in the table: other, letter, mark, number, white space."""

# Letters a contraction may end in stand for themselves; U+017F is the one other character that folds to one of them.
_FOLDED = {ord(upper): lower for lower in "strevmld" for upper in (lower, lower.upper())} | {0x17F: "s"}
_THEMSELVES = {ord("'"): "'", ord(" "): " ", ord("\r"): "R", ord("\n"): "R"} | _FOLDED
_LETTERS = "Lstrevmld"
_SPACES = " SR"

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN3_5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS: Final = {"qwen2": QWEN2, "qwen3.5": QWEN3_5}
"""The checkpoints' patterns, by the name under which a package stores them."""

_WORD_CLASSES = {"qwen2": _LETTERS, "qwen3.5": _LETTERS + "M"}

_MAX_CHARACTERS = 4096


def _translated(word: str) -> re.Pattern[str]:
    """The pattern over class signs; `word` are the signs of which a word consists."""
    return re.compile(
        rf"'(?:[stmd]|re|ve|ll)|[^RN{_LETTERS}]?[{word}]+|N| ?[^{_SPACES}N{word}]+R*"
        rf"|[{_SPACES}]*R+|[{_SPACES}]+(?![^{_SPACES}])|[{_SPACES}]+"
    )


class Pretokenizer:
    """Splits text by one of PATTERNS.

    starts: uint32, the first code point of each run of one class, ascending from 0.
    kinds: uint8, the class of each run, an index into KINDS.
    """

    def __init__(self, pattern: str, starts: Table, kinds: Table) -> None:
        self._pattern = _translated(_WORD_CLASSES[pattern])
        self._signs = _Signs(starts, kinds)

    def split(self, text: str) -> list[str]:
        """The words of a text, in order; joined they are the text."""
        signs = text.translate(self._signs)
        return [text[match.start() : match.end()] for match in self._pattern.finditer(signs)]


class _Signs(dict[int, str]):
    """Code point to class sign, looked up in the table once and kept, within a bound."""

    def __init__(self, starts: Table, kinds: Table) -> None:
        super().__init__(_THEMSELVES)
        self._starts = starts
        self._kinds = kinds

    def __missing__(self, point: int) -> str:
        if len(self) >= _MAX_CHARACTERS:
            self.clear()
            self.update(_THEMSELVES)
        sign = self[point] = KINDS[self._kinds[bisect_right(self._starts, point) - 1]]
        return sign
