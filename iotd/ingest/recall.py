"""What each topic said last, and when it was last delivered: to know a message seen before, and for minimum intervals.

Bounded: the topic that was silent longest is forgotten first, and then at worst reads once too often.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

MAX_TOPICS = 4096


@dataclass(slots=True)
class _Last:
    time_s: float
    digest: int
    delivered_s: float = -math.inf


class Recall:
    """Not thread-safe: its owner holds a lock."""

    def __init__(self, max_topics: int = MAX_TOPICS) -> None:
        self._max_topics = max_topics
        self._last: OrderedDict[str, _Last] = OrderedDict()

    def remember(self, topic: str, payload: bytes, time_s: float) -> None:
        """The topic said this; nobody knows yet whether it can be read."""
        delivered_s = self._last[topic].delivered_s if topic in self._last else -math.inf
        self._last[topic] = _Last(time_s, _digest(payload), delivered_s)
        self._last.move_to_end(topic)
        if len(self._last) > self._max_topics:
            self._last.popitem(last=False)

    def delivered(self, topic: str, time_s: float) -> None:
        """A message of the topic that came at `time_s` was read and handed on."""
        if (last := self._last.get(topic)) is not None:
            last.delivered_s = time_s

    def too_soon(self, topic: str, time_s: float, min_interval_s: float) -> bool:
        """Whether one was just delivered. False too where the clock was set back: a topic must not fall silent."""
        last = self._last.get(topic)
        return last is not None and 0 <= time_s - last.delivered_s < min_interval_s

    def copies(self, topic: str, payload: bytes, time_s: float, within_s: float) -> bool:
        """Whether the topic said the same so short a time ago."""
        last = self._last.get(topic)
        return last is not None and 0 <= time_s - last.time_s < within_s and last.digest == _digest(payload)

    def repeats(self, topic: str, payload: bytes) -> bool:
        """Whether this is what the topic said last."""
        last = self._last.get(topic)
        return last is not None and last.digest == _digest(payload)


def _digest(payload: bytes) -> int:
    """Of the length and the first 64 KiB: no two frames of a camera agree in that, and 8 MiB take milliseconds."""
    return hash((len(payload), payload[:65536]))
