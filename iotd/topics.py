"""MQTT topic filters: what is one, which topics it matches, and what a label takes from a topic's levels.

Follows MQTT 5, section 4.7 (wildcards, `$` topics) and 4.8.2 (shared subscriptions). Knows no broker.
"""

import re
from dataclasses import dataclass

_PLACE = re.compile(r"\{(\d{1,3})\}")
_NO_TEXT = re.compile(r"[\0\ud800-\udfff]")
"""What no UTF-8 string of MQTT may hold (1.5.4); YAML's escapes can write it."""


def is_topic_filter(text: str) -> bool:
    """Whether `text` is a filter, `$share/<group>/` included."""
    if text.startswith("$share/"):
        group, _, text = text.removeprefix("$share/").partition("/")
        if not group or set(group) & set("+#"):
            return False
    levels = text.split("/")
    plain = all(level in ("+", "#") or not set(level) & set("+#") for level in levels)
    return bool(text) and not _NO_TEXT.search(text) and plain and "#" not in levels[:-1] and len(text.encode()) <= 65535


@dataclass(frozen=True, slots=True)
class TopicFilter:
    """A filter, split at its levels; the `$share/<group>/` in front of it taken off."""

    levels: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "TopicFilter":
        if text.startswith("$share/"):
            text = text.split("/", 2)[-1]
        return cls(tuple(text.split("/")))

    def match(self, topic: str) -> tuple[str, ...] | None:
        """The levels that the wildcards matched, or None where the topic does not match."""
        levels = topic.split("/")
        if topic.startswith("$") and self.levels[0] in ("+", "#"):
            return None
        matched: list[str] = []
        for i, wanted in enumerate(self.levels):
            if wanted == "#":
                return (*matched, *levels[i:])
            if i >= len(levels) or wanted not in ("+", levels[i]):
                return None
            if wanted == "+":
                matched.append(levels[i])
        return tuple(matched) if len(levels) == len(self.levels) else None

    def missing(self, label: str) -> str | None:
        """The first place of a label, such as `{2}`, that no matching topic can fill; None where there is none."""
        if self.levels[-1] == "#":
            return None
        return next((place[0] for place in _PLACE.finditer(label) if int(place[1]) >= len(self.levels)), None)


def filled(label: str, topic: str) -> str:
    """The label with the topic's levels in its places; a level that the topic does not have is empty."""
    levels = topic.split("/")
    return _PLACE.sub(lambda place: levels[int(place[1])] if int(place[1]) < len(levels) else "", label)
