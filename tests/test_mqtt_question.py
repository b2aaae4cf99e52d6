"""A question's payload becomes a request, or an error that names the field."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iotd.errors import InvalidInput
from iotd.mqtt.question import (
    MAX_TRANSACTION_BYTES,
    PEEK_BYTES,
    peek_transaction,
    read,
    take_stream,
    take_transaction,
    to_request,
)
from iotd.v1 import iotd_pb2

texts = st.text(st.characters())
"""Halves of surrogate pairs too, which JSON may hold and UTF-8 may not."""
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
field_names = st.sampled_from([field.json_name for field in iotd_pb2.AskRequest.DESCRIPTOR.fields]) | texts


def test_plain_text_is_the_question() -> None:
    assert to_request(read(b"  Is a door open? {sic}")).question == "  Is a door open? {sic}"


def test_json_has_the_requests_fields_in_either_spelling() -> None:
    payload = {
        "question": "Who is there?",
        "images": ["aGk="],
        "budget": "2.5s",
        "useContext": False,
        "keep_session": True,
        "sampling": {"maxTokens": 7, "stop": ["."]},
        "choices": {"choices": ["a", "b"]},
    }
    request = to_request(read(json.dumps(payload).encode()))
    assert (request.question, list(request.images)) == ("Who is there?", [b"hi"])
    assert (request.budget.ToMilliseconds(), request.use_context, request.keep_session) == (2500, False, True)
    assert (request.sampling.max_tokens, list(request.sampling.stop)) == (7, ["."])
    assert list(request.choices.choices) == ["a", "b"]


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"question": "a", "budgte": "2s"}, "budgte", "no field budgte; there are question, images,"),
        ({"sampling": {"top": 1}}, "sampling.top", "no field sampling.top; there are temperature, topP,"),
        ({"sampling": {"topK": "x"}}, "sampling.topK", "sampling.topK: .*'x'"),
        ({"sampling": [1]}, "sampling", "sampling: "),
        ({"choices": ["\ud800"]}, "choices", "must be an object"),
        ({"\ud800": 1}, "\ud800", "no field"),
        ({"budget": 2}, "budget", "budget: Duration JSON value not a string: 2"),
        ({"budget": {"seconds": 2}}, "budget", "budget: "),
        ({"question": 1}, "question", "question: "),
        ({"images": "aGk="}, "images", "images: "),
        ({"jsonSchema": "{}", "regex": "a"}, "", "oneof"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(fields: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as refused:
        to_request(fields)
    assert refused.value.field == field


@pytest.mark.parametrize("payload", [b'{"question": ', b"{" * 100_000, b'{"a":' * 100_000, b"\xff", b'{"a": "\xff"}'])
def test_what_cannot_be_read_is_refused(payload: bytes) -> None:
    with pytest.raises(InvalidInput):
        read(payload)


@given(st.dictionaries(field_names, json_values, max_size=3))
def test_any_json_is_a_request_or_an_input_error(fields: dict[str, Any]) -> None:
    try:
        read_fields = read(json.dumps(fields).encode())
        take_transaction(read_fields)
        take_stream(read_fields)
        to_request(read_fields)
    except InvalidInput as error:
        assert str(error)


@given(st.binary(max_size=64))
def test_any_payload_is_a_request_or_an_input_error(payload: bytes) -> None:
    try:
        to_request(read(payload))
    except InvalidInput as error:
        assert str(error)


@pytest.mark.parametrize("transaction", [7, "seven", {"id": [1, None]}, None])
def test_the_transaction_is_any_short_json(transaction: object) -> None:
    fields = {"question": "a", "transaction": transaction}
    assert peek_transaction(json.dumps(fields).encode()) == transaction
    assert take_transaction(fields) == transaction
    assert fields == {"question": "a"}


@pytest.mark.parametrize("transaction", ["x" * MAX_TRANSACTION_BYTES, float("nan"), float("inf")])
def test_a_transaction_that_cannot_be_repeated_is_refused(transaction: object) -> None:
    with pytest.raises(InvalidInput) as refused:
        take_transaction({"transaction": transaction})
    assert refused.value.field == "transaction"


def test_a_peek_takes_no_time_and_never_fails() -> None:
    assert peek_transaction(json.dumps({"transaction": 1, "question": "x" * PEEK_BYTES}).encode()) is None
    assert peek_transaction(b'{"transaction":') is None


def test_stream_is_true_or_false() -> None:
    assert (take_stream({}), take_stream({"stream": True})) == (False, True)
    with pytest.raises(InvalidInput) as refused:
        take_stream({"stream": "yes"})
    assert refused.value.field == "stream"
