"""How an answer ends where its time does: behind its last whole sentence. Knows no clock and no model."""

from iotd.model.endings import ELLIPSIS, SENTENCE_END, TAIL, ends_sentence


class Sentences:
    """Passes text on as it comes; near the end, once a sentence is whole, only whole sentences."""

    def __init__(self) -> None:
        self._told = ""
        self._held = ""

    def push(self, text: str, *, near_end: bool) -> str:
        """What can be told by now."""
        if not self._held and not (near_end and ends_sentence(self._told)):
            return self._tell(text)
        self._held += text
        ends = [match.end() for match in SENTENCE_END.finditer(self._held)]
        if not ends:
            return ""
        whole, self._held = self._held[: ends[-1]], self._held[ends[-1] :]
        return self._tell(whole)

    def rest(self, *, cut_off: bool) -> str:
        """What is still to be told at the end. cut_off: the answer did not come to an end by itself."""
        held, self._held = self._held, ""
        half = held.endswith(ELLIPSIS) or not ends_sentence(held)
        return "" if cut_off and half else held

    @property
    def holding(self) -> bool:
        """What was told is whole, and more was said."""
        return bool(self._held)

    @property
    def whole(self) -> bool:
        """Something was said, and what is held back with it, nothing half."""
        return ends_sentence(self._told + self._held)

    def _tell(self, text: str) -> str:
        # The end is all that is looked at.
        self._told = (self._told + text)[-TAIL:]
        return text
