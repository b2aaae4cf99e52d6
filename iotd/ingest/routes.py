"""The configured subscriptions as a table: which one reads a topic, and under which label.

The first subscription in the list that matches a topic reads it; the later ones do not. Knows no payload.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from iotd.config import SubscriptionConfig
from iotd.ingest.text import MAX_LABEL_CHARS, one_line
from iotd.topics import TopicFilter, filled


@dataclass(frozen=True, slots=True)
class Route:
    """Where one message goes."""

    subscription: SubscriptionConfig
    label: str
    overlaps: bool
    """Whether later subscriptions match the topic too, so that a broker may send it more than once."""


class Routes:
    """All subscriptions, compiled."""

    def __init__(self, subscriptions: Sequence[SubscriptionConfig]) -> None:
        self.subscriptions = tuple(subscriptions)
        self._compiled = [(s, TopicFilter.parse(s.topic)) for s in subscriptions]

    def find(self, topic: str) -> Route | None:
        found = [(s, m) for s, f in self._compiled if (m := f.match(topic)) is not None]
        if not found:
            return None
        subscription, matched = found[0]
        return Route(subscription, _label(subscription.label, topic, matched), len(found) > 1)


def _label(template: str, topic: str, matched: tuple[str, ...]) -> str:
    """The name of a reading: the template with its levels filled in, else the matched levels, else the topic."""
    name = filled(template, topic) if template else " ".join(matched)
    return one_line(name, MAX_LABEL_CHARS) or one_line(topic, MAX_LABEL_CHARS)
