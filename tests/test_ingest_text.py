"""Text and JSON from outside become one safe line, or an error that says what was wrong."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iotd.config import SubscriptionConfig
from iotd.errors import InvalidInput
from iotd.events import Frame, Reading
from iotd.ingest.errors import Empty, MissingField, NotJson, NotUtf8
from iotd.ingest.fields import MAX_FIELDS, render_json
from iotd.ingest.parse import parse
from iotd.ingest.routes import Routes
from iotd.ingest.text import MAX_TEXT_CHARS, one_line, render_text

SUBSCRIPTIONS = [
    SubscriptionConfig(topic="text", unit="°C"),
    SubscriptionConfig(topic="json", kind="json"),
    SubscriptionConfig(topic="fields", kind="json", fields={"a": "°C", "a.b": "", "0": "%", "value": ""}),
    SubscriptionConfig(topic="image", kind="image"),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["a", "b", "value"]), inner),
)


@pytest.mark.parametrize(
    ("payload", "unit", "line"),
    [
        (b"23.4", "°C", "23.4 °C"),
        (b"  open\n", "", "open"),
        (b"\xef\xbb\xbfopen\x00", "", "open"),
        ("a\r\nb\tc\u2028d\u2029e\x1b[31m".encode(), "", "a b c d e [31m"),
        ("\u202eevil\u2066".encode(), "", "evil"),
        ("👩‍🌾 נעול".encode(), "", "👩‍🌾 נעול"),
        (b"<|im_end|>", "", "<|im_end|>"),
    ],
)
def test_text_becomes_one_line_without_control_characters(payload: bytes, unit: str, line: str) -> None:
    assert line == render_text(payload, unit)


def test_long_text_is_cut_and_says_so() -> None:
    line = render_text(b"x" * 10_000)
    assert (len(line), line[-1]) == (MAX_TEXT_CHARS, "…")
    assert render_text(b"x" * MAX_TEXT_CHARS) == "x" * MAX_TEXT_CHARS


def test_text_that_is_no_utf8_names_the_byte() -> None:
    with pytest.raises(NotUtf8, match="0xff at 2"):
        render_text(b"ab\xff")


@pytest.mark.parametrize("payload", [b"", b" \n\t", b"\x00"])
def test_nothing_is_not_a_reading(payload: bytes) -> None:
    with pytest.raises(Empty):
        render_text(payload)


@given(st.text(max_size=2000))
def test_any_text_becomes_a_line_of_bounded_length_that_utf8_can_carry(text: str) -> None:
    line = one_line(text)
    assert len(line) <= MAX_TEXT_CHARS
    assert line == line.strip()
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in line)
    line.encode()


@pytest.mark.parametrize(
    ("payload", "fields", "line"),
    [
        (
            {"temperature": 23.4, "humidity": 40},
            {"temperature": "°C", "humidity": "%"},
            "temperature 23.4 °C, humidity 40 %",
        ),
        ({"temperature": 23.400000000000002}, {"temperature": "°C"}, "temperature 23.4 °C"),
        ({"a": {"b": [{"c_d": 1}]}}, {"a.b.0.c_d": "W"}, "a b 0 c d 1 W"),
        ({"a.b": 1, "a": {"b": 2}}, {"a.b": ""}, "a b 1"),
        ({"open": True, "locked": False, "since": None}, {}, "open true, locked false, since unknown"),
        ({"on": True}, {"on": "W"}, "on true"),
        ({"n": 1, "deep": {"x": 1}, "list": [1]}, {}, "n 1"),
        ({"deep": {"x": 1}}, {"deep": ""}, 'deep {"x":1}'),
        ({"value": 12}, {"value": "W"}, "12 W"),
        ({"t": 20, "extra": 1}, {"t": "°C", "h": "%"}, "t 20 °C"),
        ({"name": "a\nb\x00"}, {"name": ""}, "name a b"),
        ({"n": 10**400, "m": 2**63}, {}, "n unknown, m 9.223372e+18"),
    ],
)
def test_json_becomes_its_fields_with_their_units(payload: object, fields: dict[str, str], line: str) -> None:
    assert line == render_json(json.dumps(payload).encode(), fields)


@pytest.mark.parametrize(
    ("payload", "line"),
    [
        (b"23.5", "23.5 W"),
        (b'"high"', "high W"),
        (b"true", "true"),
        (b"null", "unknown"),
        (b"[1,2]", "[1,2]"),
        (b"1e999", "unknown"),
    ],
)
def test_bare_json_is_a_value(payload: bytes, line: str) -> None:
    assert line == render_json(payload, {}, "W")


def test_half_a_character_escaped_in_json_is_left_out() -> None:
    """A lone surrogate: no UTF-8 can carry it, so no tokenizer could take it."""
    assert render_json(rb'"\ud800x"', {}) == "x"


def test_nan_is_unknown() -> None:
    assert render_json(b'{"t": NaN, "u": -Infinity}', {}) == "t unknown, u unknown"


def test_an_object_of_many_fields_is_cut() -> None:
    line = render_json(json.dumps({f"k{i}": i for i in range(100)}).encode(), {})
    assert line.count(",") == MAX_FIELDS - 1


@pytest.mark.parametrize(
    ("payload", "fields", "error", "message"),
    [
        (b"{", {}, NotJson, "line 1 column 2"),
        (b"[" * 100_000, {}, NotJson, "nested too deeply"),
        (b"1" * 5000, {}, NotJson, "^a number in the payload has thousands of digits$"),
        (b"\xff", {}, NotUtf8, "0xff at 0"),
        (b" ", {}, Empty, "empty"),
        (b'""', {}, Empty, "empty"),
        (b'{"x": 1, "y": 2}', {"t": "°C"}, MissingField, "no field t: it has x, y"),
        (b"3", {"t": "°C"}, MissingField, "no object"),
        (b'{"x": {}}', {}, MissingField, "any plain value"),
    ],
)
def test_json_that_cannot_be_used_says_why(
    payload: bytes, fields: dict[str, str], error: type[InvalidInput], message: str
) -> None:
    with pytest.raises(error, match=message):
        render_json(payload, fields)


@given(
    st.binary() | JSON.map(lambda value: json.dumps(value).encode()), st.sampled_from([s.topic for s in SUBSCRIPTIONS])
)
def test_any_payload_becomes_an_event_or_invalid_input(payload: bytes, topic: str) -> None:
    """No bytes make the parser raise anything else, whatever they were subscribed as."""
    route = Routes(SUBSCRIPTIONS).find(topic)
    assert route is not None
    try:
        event = parse(route, payload, 1.0, max_pixels=1000, keep_pixels=1000)
    except InvalidInput as e:
        assert str(e)
        return
    if isinstance(event, Frame):
        assert event.rgb.size <= 3000
    else:
        assert isinstance(event, Reading)
        assert len(event.text.encode()) > 0
        assert "\n" not in event.text
