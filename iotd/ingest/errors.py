"""What can be wrong with a payload. Each is counted by its `reason` and never stops the stream."""

from iotd.errors import InvalidInput


class NotUtf8(InvalidInput):
    """A text or JSON payload that is not UTF-8."""

    reason = "NOT_UTF8"


class NotJson(InvalidInput):
    """A payload of a `json` subscription that does not parse."""

    reason = "NOT_JSON"


class MissingField(InvalidInput):
    """JSON with none of the fields that were asked for."""

    reason = "MISSING_FIELD"


class Empty(InvalidInput):
    """Nothing but white space: in MQTT, the message that deletes a retained one."""

    reason = "EMPTY"


class NotImage(InvalidInput):
    """A payload that does not decode wholly as JPEG or PNG."""

    reason = "NOT_IMAGE"


class TooLarge(InvalidInput):
    """More bytes or pixels than the configuration allows, or an absurdly long image. Nothing was decoded."""

    reason = "TOO_LARGE"
