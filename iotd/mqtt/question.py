"""A question as it comes over MQTT: plain text, or JSON with the AskRequest's fields in lowerCamelCase.

Pure: payload in, request out. Knows no broker and no clock.
"""

import json
from dataclasses import dataclass
from typing import Any

import paho.mqtt.client as paho
from google.protobuf import json_format
from google.protobuf.message import Message

from iotd.errors import InvalidInput
from iotd.v1 import iotd_pb2

MAX_TRANSACTION_BYTES = 256
PEEK_BYTES = 65_536
"""JSON of this size is read in about a millisecond on a board, so that it can be done where nothing may wait."""

_PACKAGE = "iotd."

Fields = dict[str, Any]
"""The question's JSON, the envelope's own fields included until they are taken out."""


@dataclass(frozen=True, slots=True)
class Question:
    """One message, with all of its envelope that counts."""

    payload: bytes
    arrived_s: float
    """On the monotonic clock."""
    left_s: float | None
    """What was left of its Message Expiry Interval; None where it has none."""
    response_topic: str
    """Empty where it has none that can be published to."""
    correlation: bytes | None


def from_message(message: paho.MQTTMessage, arrived_s: float) -> Question:
    """arrived_s: on the monotonic clock. MQTT 3.1.1 has no properties: then there is the payload alone."""
    properties = message.properties
    topic = getattr(properties, "ResponseTopic", "")
    return Question(
        payload=bytes(message.payload),
        arrived_s=arrived_s,
        left_s=getattr(properties, "MessageExpiryInterval", None),
        # Of a topic with a wildcard paho would make an exception in the thread of the connection.
        response_topic="" if set(topic) & set("+#\0") else topic,
        correlation=getattr(properties, "CorrelationData", None),
    )


def read(payload: bytes) -> Fields:
    """The fields; of plain text the question alone.

    Raises InvalidInput for what is no UTF-8, or begins like JSON and is none.
    """
    try:
        text = payload.decode()
    except UnicodeDecodeError as e:
        raise InvalidInput("the question is not UTF-8 text", field="question") from e
    if not text.lstrip().startswith("{"):
        return {"question": text}
    try:
        fields: Fields = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InvalidInput(f"begins like JSON, and is none: {e}") from e
    return fields


def take_transaction(fields: Fields) -> object:
    """What the answer repeats, None for nothing: any JSON that is not long. Raises InvalidInput."""
    transaction = fields.pop("transaction", None)
    try:
        size = len(json.dumps(transaction, allow_nan=False))
    except ValueError as e:
        raise InvalidInput("transaction holds a number that JSON does not know", field="transaction") from e
    if size > MAX_TRANSACTION_BYTES:
        message = f"transaction: {size} bytes given, at most {MAX_TRANSACTION_BYTES} taken"
        raise InvalidInput(message, field="transaction")
    return transaction


def peek_transaction(payload: bytes) -> object:
    """The transaction, where it can be had at once; else None."""
    try:
        return take_transaction(read(payload)) if len(payload) <= PEEK_BYTES else None
    except InvalidInput:
        return None


def take_stream(fields: Fields) -> bool:
    """Whether the answer's pieces are asked for. Raises InvalidInput."""
    stream = fields.pop("stream", False)
    if not isinstance(stream, bool):
        raise InvalidInput(f"stream is {stream!r}: it must be true or false", field="stream")
    return stream


def to_request(fields: Fields) -> iotd_pb2.AskRequest:
    """Raises InvalidInput with the path of the field that is unknown or of the wrong type."""
    request = iotd_pb2.AskRequest()
    _check_names(fields, request)
    try:
        return json_format.ParseDict(fields, request)
    except json_format.ParseError as e:
        at = _culprit(fields, request)
        raise InvalidInput(f"{at}: {_innermost(e)}" if at else _innermost(e), field=at) from e


def _check_names(fields: Fields, message: Message, path: str = "") -> None:
    """Before protobuf looks at them: in a name that is no UTF-8 it trips over itself (upb, 7.36)."""
    for name, value in fields.items():
        at = path + name
        field = _field(message, name)
        if field is None:
            known = ", ".join(field.json_name for field in message.DESCRIPTOR.fields)
            raise InvalidInput(f"no field {at}; there are {known}", field=at)
        if _nests(field) and value is not None:
            if not isinstance(value, dict):
                raise InvalidInput(f"{at}: must be an object, in braces", field=at)
            _check_names(value, getattr(message, field.name), f"{at}.")


def _culprit(fields: Fields, message: Message, path: str = "") -> str:
    """The path of the first field that cannot be used even alone; empty where they only do not go together.

    Found by trying: protobuf tells it in its messages only, and not in the same words in every version.
    """
    for name, value in fields.items():
        try:
            json_format.ParseDict({name: value}, type(message)())
        except json_format.ParseError:
            field = _field(message, name)
            assert field is not None, "names are checked before"
            at = path + name
            return _culprit(value, getattr(message, field.name), f"{at}.") or at if _nests(field) else at
    return ""


def _field(message: Message, name: str) -> Any:
    """Its FieldDescriptor, None where there is none; the type stubs know two classes of these."""
    return next((field for field in message.DESCRIPTOR.fields if name in (field.json_name, field.name)), None)


def _nests(field: Any) -> bool:
    """Whether its JSON is an object of fields, and not a text as a Duration's is."""
    kind = field.message_type
    return kind is not None and kind.full_name.startswith(_PACKAGE)


def _innermost(error: BaseException) -> str:
    """protobuf wraps an error once for each level it passes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)
