"""The answer to one question over MQTT, from its events to the messages that go out.

Knows neither how it is answered nor how it is published.
"""

import json
import re
from collections.abc import Callable, Mapping

from google.protobuf import json_format

from iotd.errors import InvalidInput, IotdError
from iotd.mqtt.outbox import Outgoing
from iotd.mqtt.question import Question
from iotd.v1 import iotd_pb2

_FINISH_REASON = "FINISH_REASON_"


class Reply:
    """Sends one answer or one error, and the pieces before it where `streams` is set."""

    def __init__(self, question: Question, base: str, send: Callable[[Outgoing], None]) -> None:
        """base: the topics' beginning. send: takes what is to be published; must not block."""
        self.transaction: object = None
        """Repeated in all that is sent; None for nothing."""
        self.streams = False
        self.due_s = question.arrived_s
        """When the answer must have ended, monotonic: after a lost connection it is not sent any more."""
        self._topic = question.response_topic or f"{base}/answer"
        self._stream_topic = f"{base}/answer/stream"
        self._correlation = question.correlation
        self._send = send
        self._request_id = ""
        self._text: list[str] = []
        self._ended = False

    async def write(self, event: iotd_pb2.AskEvent) -> None:
        """The next event of the answer."""
        match event.WhichOneof("event"):
            case "accepted":
                self._request_id = event.accepted.request_id
            case "delta":
                self._add(event.delta)
            case "done":
                self._finish({"status": "ok", "data": self._data(event.done)})

    def fail(self, error: IotdError) -> None:
        """Instead of an answer, or of its end; the first end counts. From any thread."""
        self._finish({"status": "error", "error": to_json(error)})

    def _add(self, delta: iotd_pb2.AskDelta) -> None:
        if not delta.thought:
            self._text.append(delta.text)
        if self.streams:
            thought = {"thought": True} if delta.thought else {}
            payload = {"text": delta.text, **thought, "requestId": self._request_id}
            self._send(Outgoing(self._stream_topic, self._encoded(payload), self._correlation))

    def _data(self, done: iotd_pb2.AskDone) -> dict[str, object]:
        """protobuf's own JSON of an AskDone, with the text before it; the finish reason as the status has it."""
        told = json_format.MessageToDict(done, always_print_fields_with_no_presence=True)
        told["finishReason"] = told["finishReason"].removeprefix(_FINISH_REASON).lower()
        if not done.session:
            del told["session"]
        return {"text": "".join(self._text), **told, "requestId": self._request_id}

    def _finish(self, payload: Mapping[str, object]) -> None:
        if self._ended:
            return
        self._ended = True
        self._send(Outgoing(self._topic, self._encoded(payload), self._correlation, self.due_s))

    def _encoded(self, payload: Mapping[str, object]) -> bytes:
        if self.transaction is not None:
            payload = {**payload, "transaction": self.transaction}
        # Half a surrogate pair, which JSON may hold and UTF-8 may not, becomes its own escape again.
        return json.dumps(payload, ensure_ascii=False).encode(errors="backslashreplace")


def to_json(error: IotdError) -> dict[str, object]:
    """The error as a gRPC client is told it, fields in lowerCamelCase."""
    told: dict[str, object] = {"code": error.code, "reason": error.reason, "message": str(error)}
    if isinstance(error, InvalidInput) and error.field:
        told["field"] = re.sub(r"_([a-z])", lambda match: match[1].upper(), error.field)
    if (retry_s := getattr(error, "retry_after_s", None)) is not None:
        told["retryDelay"] = f"{retry_s:g}s"
    if metadata := error.metadata:
        told["metadata"] = metadata
    return told
