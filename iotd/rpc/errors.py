"""iotd's errors as gRPC statuses with google.rpc details.

The status code comes from the error's own `code`; this adds what a client needs to act on it.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from iotd.errors import Internal, InvalidInput, IotdError
from iotd.rpc.times import duration

log = logging.getLogger(__name__)

DOMAIN = "iotd"
DEFAULT_RETRY_S = 1.0
_RETRIED_CODES = ("RESOURCE_EXHAUSTED", "UNAVAILABLE")
# A message may quote the request, and travels twice in the trailers, of which clients accept 8 KiB by default.
_MAX_MESSAGE_CHARS = 500


def to_status(error: IotdError) -> Status:
    """The error as google.rpc.Status: its code, its message, and its details."""
    status = Status(code=Code.Value(error.code), message=_message(error))
    for detail in _details(error):
        status.details.add().Pack(detail)
    return status


def _details(error: IotdError) -> list[Message]:
    details: list[Message] = [ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)]
    if error.code in _RETRIED_CODES:
        details.append(RetryInfo(retry_delay=duration(getattr(error, "retry_after_s", DEFAULT_RETRY_S))))
    if isinstance(error, InvalidInput):
        violation = BadRequest.FieldViolation(field=error.field, description=_message(error), reason=error.reason)
        details.append(BadRequest(field_violations=[violation]))
    return details


def _message(error: IotdError) -> str:
    message = str(error)
    return message if len(message) <= _MAX_MESSAGE_CHARS else message[: _MAX_MESSAGE_CHARS - 1] + "…"


@asynccontextmanager
async def errors_as_status(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """Around one RPC: what it raises ends the call with the status it maps to; a defect is logged with its trace."""
    try:
        yield
        return
    except IotdError as error:
        status = to_status(error)
    except Exception:  # the edge of an RPC: whatever it was, the caller gets a status
        log.exception("an RPC failed")
        status = to_status(Internal("a defect in iotd: the daemon's log has the details"))
    await context.abort_with_status(rpc_status.to_status(status))
