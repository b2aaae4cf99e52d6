"""The errors iotd raises on purpose, and the status code each one becomes on the wire.

`code` is a canonical google.rpc.Code name: gRPC, MQTT and the command line all take it from here.
"""

from typing import ClassVar


class IotdError(Exception):
    """Something a caller can be told: what was wrong, where, and what to do about it."""

    code: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"

    @property
    def metadata(self) -> dict[str, str]:
        """Figures that a caller can act on, by their name on the wire."""
        return {}


class InvalidInput(IotdError):
    """A request, a configuration or a payload that cannot be used. `field` names the part at fault."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_INPUT"

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class ConfigError(InvalidInput):
    """The configuration is wrong; `field` is the key's path, such as `mqtt.subscriptions[2].kind`."""

    reason = "INVALID_CONFIG"

    def __str__(self) -> str:
        """The message, which always names the key."""
        message = super().__str__()
        return message if self.field in message else f"{self.field}: {message}"


class ContextOverflow(InvalidInput):
    """A prompt needs more positions than the state has left. Nothing was run."""

    reason = "CONTEXT_OVERFLOW"

    def __init__(self, needed: int, available: int, *, field: str = "question") -> None:
        super().__init__(
            f"the prompt needs {needed} tokens and {available} are free: shorten it, or give it a larger capacity "
            "(of the daemon: ask.reserve_tokens)",
            field=field,
        )
        self.needed = needed
        self.available = available

    @property
    def metadata(self) -> dict[str, str]:
        return {"neededTokens": str(self.needed), "availableTokens": str(self.available)}


class CheckpointError(IotdError):
    """A Hugging Face checkpoint that cannot be converted."""

    code = "FAILED_PRECONDITION"
    reason = "BAD_CHECKPOINT"


class PackageError(IotdError):
    """A model package that is missing, damaged, or made by an incompatible version."""

    code = "UNAVAILABLE"
    reason = "BAD_MODEL_PACKAGE"


class StateMismatch(IotdError):
    """A state that belongs to another model was given to this one."""

    code = "FAILED_PRECONDITION"
    reason = "STATE_MISMATCH"


class SnapshotError(IotdError):
    """A saved context that cannot be read, or is of another model or another configuration. It is never half used."""

    code = "FAILED_PRECONDITION"
    reason = "BAD_SNAPSHOT"


class Overloaded(IotdError):
    """The queue is full, or no useful answer fits into the budget. Try again after `retry_after_s` seconds.

    `needed_s`: the budget with which it would have been accepted; None where the queue is full.
    """

    code = "RESOURCE_EXHAUSTED"
    reason = "OVERLOADED"

    def __init__(self, message: str, *, retry_after_s: float = 1.0, needed_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.needed_s = needed_s

    @property
    def metadata(self) -> dict[str, str]:
        return {} if self.needed_s is None else {"neededSeconds": f"{self.needed_s:.6f}"}


class Unavailable(IotdError):
    """Loading, draining, or without a model. Try again after `retry_after_s` seconds."""

    code = "UNAVAILABLE"
    reason = "UNAVAILABLE"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(IotdError):
    """The budget ended before the first piece of an answer."""

    code = "DEADLINE_EXCEEDED"
    reason = "BUDGET_EXCEEDED"


class NotFound(IotdError):
    """An unknown camera, session or watch."""

    code = "NOT_FOUND"
    reason = "NOT_FOUND"


class Unauthenticated(IotdError):
    """No credentials, or wrong ones."""

    code = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class PermissionDenied(IotdError):
    """The credentials are good, and do not allow this call."""

    code = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"


class Internal(IotdError):
    """A defect of iotd itself. Its trace is in the log; its message says nothing of the inside."""
