"""Topic filters match as the standard says, and give readings their names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from iotd.config import SubscriptionConfig
from iotd.ingest.routes import Routes
from iotd.ingest.text import MAX_LABEL_CHARS
from iotd.topics import TopicFilter

LEVELS = st.sampled_from(["a", "b", "", "$x"])
TOPICS = st.lists(LEVELS, min_size=1, max_size=5).map("/".join).filter(bool)
FILTERS = st.tuples(st.lists(LEVELS | st.just("+"), max_size=4), st.sampled_from(["a", "+", "#"])).map(
    lambda parts: "/".join([*parts[0], parts[1]])
)


@given(FILTERS, TOPICS)
def test_filters_match_what_paho_says_they_match(text: str, topic: str) -> None:
    assert topic_matches_sub(text, topic) == (TopicFilter.parse(text).match(topic) is not None)


@pytest.mark.parametrize(
    ("text", "topic", "matched"),
    [
        ("home/+/temperature", "home/kitchen/temperature", ("kitchen",)),
        ("home/#", "home", ()),
        ("home/#", "home/a/b", ("a", "b")),
        ("+/x/#", "home/x/a", ("home", "a")),
        ("home/a", "home/a", ()),
        ("$share/group/home/+", "home/a", ("a",)),
        ("#", "$SYS/load", None),
        ("home/+", "home", None),
        ("home/a", "home/a/b", None),
    ],
)
def test_wildcards_tell_what_they_matched(text: str, topic: str, matched: tuple[str, ...] | None) -> None:
    assert matched == TopicFilter.parse(text).match(topic)


@pytest.mark.parametrize(
    ("topic", "template", "name"),
    [
        ("home/+/temperature", "{1} temperature", "kitchen temperature"),
        ("home/+/temperature", "", "kitchen"),
        ("+/+/temperature", "", "home kitchen"),
        ("home/kitchen/temperature", "", "home/kitchen/temperature"),
        ("home/#", "{0}: {1} {7}", "home: kitchen"),
        ("home/#", "{7}", "home/kitchen/temperature"),
        ("home/#", "100 {} % {x}", "100 {} % {x}"),
    ],
)
def test_labels_are_made_of_the_topics_levels(topic: str, template: str, name: str) -> None:
    route = Routes([SubscriptionConfig(topic=topic, label=template)]).find("home/kitchen/temperature")
    assert route is not None
    assert name == route.label


def test_a_label_is_bounded_and_free_of_control_characters() -> None:
    route = Routes([SubscriptionConfig(topic="#")]).find("a\x1b\n" * 100)
    assert route is not None
    assert len(route.label) == MAX_LABEL_CHARS
    assert route.label.isprintable()


def test_the_first_subscription_that_matches_reads_the_topic() -> None:
    routes = Routes(
        [SubscriptionConfig(topic="home/+/t", label="first"), SubscriptionConfig(topic="home/#", label="rest")]
    )
    found = routes.find("home/a/t"), routes.find("home/a/h"), routes.find("other")
    assert [(route.label, route.overlaps) if route else None for route in found] == [
        ("first", True),
        ("rest", False),
        None,
    ]
