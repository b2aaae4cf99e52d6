"""How an answer ends where its time does: behind its last whole sentence. Knows no clock and no model."""

import re

_END = re.compile(r"(?:[.!?…]+[\"'”’)\]*]*(?=\s)|[。！？]|\n)\s*")
"""A sentence has ended, with the space behind it: a point inside of a number or a name has none."""
_WHOLE = re.compile(r"(?:(?<!\d)[.!?…]+[\"'”’)\]*]*|[。！？]|\n)\s*\Z")
"""The same at the end of the text; behind a digit a point may be a decimal one."""


class Sentences:
    """Passes text on as it comes; near the end, once a sentence is whole, only whole sentences."""

    def __init__(self) -> None:
        self._told = ""
        self._held = ""

    def push(self, text: str, *, near_end: bool) -> str:
        """What can be told by now."""
        if not self._held and not (near_end and self._whole):
            return self._tell(text)
        self._held += text
        ends = [match.end() for match in _END.finditer(self._held)]
        if not ends:
            return ""
        whole, self._held = self._held[: ends[-1]], self._held[ends[-1] :]
        return self._tell(whole)

    def rest(self, *, cut_off: bool) -> str:
        """What is still to be told at the end. cut_off: the answer did not come to an end by itself."""
        held, self._held = self._held, ""
        return "" if cut_off and not _WHOLE.search(held) else held

    @property
    def _whole(self) -> bool:
        """Something was told, and nothing half."""
        return _WHOLE.search(self._told) is not None

    def _tell(self, text: str) -> str:
        # The end is all that is looked at.
        self._told = (self._told + text)[-32:]
        return text
