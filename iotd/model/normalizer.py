"""Unicode normalisation form C, by the tables of the version of Unicode that the reference tokenizer has.

Knows no token. Python's `unicodedata` is newer than the reference's tables and reorders or composes characters which
those do not know. Normalisation of a character never changes once it is assigned, so it is enough to apply Python's to
the stretches of text which consist of characters the reference knows to take part, and to leave all others alone.
"""

import re
import unicodedata
from functools import cached_property

from iotd.model.tokenizer_file import Table

_FIRST_MARK = "\u0300"
"""Nothing below composes or reorders without a character from here on."""
_SURROGATE = re.compile("[\ud800-\udfff]")


class Normalizer:
    """NFC. starts, ends: uint32, inclusive ranges of the code points that take part in normalisation."""

    def __init__(self, starts: Table, ends: Table) -> None:
        self._starts = starts
        self._ends = ends

    def normalize(self, text: str) -> str:
        """The text in NFC; a lone surrogate, which no UTF-8 text contains, becomes U+FFFD."""
        if text.isascii() or max(text) < _FIRST_MARK:
            return text
        return self._stretches.sub(lambda match: unicodedata.normalize("NFC", match[0]), _SURROGATE.sub("\ufffd", text))

    @cached_property
    def _stretches(self) -> re.Pattern[str]:
        ranges = zip(self._starts, self._ends, strict=True)
        return re.compile("[" + "".join(f"{_escaped(start)}-{_escaped(end)}" for start, end in ranges) + "]+")


def _escaped(point: int) -> str:
    return f"\\U{point:08x}"
