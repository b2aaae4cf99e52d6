"""Every error ends a call with its status and its google.rpc details; every bad field is named."""

import logging
import math
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status
from scripted_engine import PNG, Daemon, channel, running

from iotd import errors
from iotd.config import AskConfig
from iotd.rpc.errors import to_status
from iotd.rpc.request import MAX_LABEL_CHARS, MAX_LABELS, MAX_QUESTION_CHARS, MAX_STOP_CHARS, MAX_STOPS
from iotd.rpc.times import duration
from iotd.v1 import iotd_pb2, iotd_pb2_grpc


@pytest.fixture(scope="module")
def served() -> Iterator[Daemon]:
    with running(ask=AskConfig(max_images=2)) as daemon:
        yield daemon


@pytest.fixture
def daemon(served: Daemon) -> Iterator[Daemon]:
    yield served
    served.engine.refusal = None


@pytest.fixture(scope="module")
def stub(served: Daemon) -> Iterator[Any]:
    with channel(served) as opened:
        yield iotd_pb2_grpc.IotdStub(opened)


def details(status: Status) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for detail in status.details:
        for kind in (ErrorInfo, RetryInfo, BadRequest):
            message = kind()
            if detail.Unpack(message):
                found[kind.__name__] = message
    assert len(found) == len(status.details)
    return found


def failure(answer: Any) -> tuple[grpc.StatusCode, Status]:
    with pytest.raises(grpc.RpcError) as caught:
        list(answer)
    status = rpc_status.from_call(caught.value)
    assert status is not None
    return caught.value.code(), status


TABLE = [
    (errors.InvalidInput("bad", field="question"), "INVALID_ARGUMENT"),
    (errors.ContextOverflow(900, 100), "INVALID_ARGUMENT"),
    (errors.Overloaded("queue full", retry_after_s=2.5), "RESOURCE_EXHAUSTED"),
    (errors.Unavailable("loading", retry_after_s=1.5), "UNAVAILABLE"),
    (errors.PackageError("no model"), "UNAVAILABLE"),
    (errors.DeadlineExceeded("too late"), "DEADLINE_EXCEEDED"),
    (errors.Unauthenticated("who are you?"), "UNAUTHENTICATED"),
    (errors.PermissionDenied("not you"), "PERMISSION_DENIED"),
    (errors.NotFound("no camera 'porch'"), "NOT_FOUND"),
    (errors.StateMismatch("another model"), "FAILED_PRECONDITION"),
    (errors.Internal("sorry"), "INTERNAL"),
]


@pytest.mark.parametrize(("error", "code"), TABLE, ids=[type(error).__name__ for error, _ in TABLE])
@pytest.mark.parametrize("late", [False, True], ids=["at once", "after some text"])
def test_each_error_has_its_status_and_details(
    daemon: Daemon, stub: Any, error: errors.IotdError, code: str, late: bool
) -> None:
    daemon.engine.refusal = None if late else error
    answer = stub.Ask(iotd_pb2.AskRequest(question="why?"))
    if late:
        ticket = daemon.engine.next()
        ticket.say("because")
        ticket.fail(error)
    received, status = failure(answer)
    info = details(status)

    assert received is grpc.StatusCode[code]
    assert status.message == str(error)
    assert (info["ErrorInfo"].domain, info["ErrorInfo"].reason) == ("iotd", error.reason)
    assert ("RetryInfo" in info) == (code in ("RESOURCE_EXHAUSTED", "UNAVAILABLE"))
    if isinstance(error, errors.Overloaded | errors.Unavailable):
        assert info["RetryInfo"].retry_delay == duration(error.retry_after_s)
    assert ("BadRequest" in info) == (code == "INVALID_ARGUMENT")
    if isinstance(error, errors.InvalidInput):
        (violation,) = info["BadRequest"].field_violations
        assert (violation.field, violation.description) == ("question", str(error))


def test_a_defect_is_internal_logged_with_its_trace_and_tells_nothing(
    daemon: Daemon, stub: Any, caplog: pytest.LogCaptureFixture
) -> None:
    daemon.engine.refusal = ZeroDivisionError("secret of the inside")
    with caplog.at_level(logging.ERROR, "iotd.rpc"):
        code, status = failure(stub.Ask(iotd_pb2.AskRequest(question="why?")))
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in status.message
    assert details(status)["ErrorInfo"].reason == "INTERNAL"
    assert "ZeroDivisionError: secret of the inside" in caplog.text


def test_a_message_that_quotes_the_request_still_fits_the_trailers() -> None:
    status = to_status(errors.InvalidInput("no camera " + "x" * 100_000, field="camera"))
    assert status.ByteSize() < 4096


def sampling(**options: Any) -> dict[str, Any]:
    return {"sampling": iotd_pb2.SamplingOptions(**options)}


BAD_FIELDS = [
    ({"question": ""}, "question"),
    ({"question": " \n"}, "question"),
    ({"question": "x" * (MAX_QUESTION_CHARS + 1)}, "question"),
    ({"camera": "x" * 300}, "camera"),
    ({"images": [PNG] * 3}, "images"),
    ({"images": [PNG, b"GIF89a"]}, "images[1]"),
    ({"budget": duration(0)}, "budget"),
    ({"budget": duration(-1)}, "budget"),
    (sampling(temperature=-0.1), "sampling.temperature"),
    (sampling(temperature=math.nan), "sampling.temperature"),
    (sampling(temperature=math.inf), "sampling.temperature"),
    (sampling(top_p=0), "sampling.top_p"),
    (sampling(top_p=1.01), "sampling.top_p"),
    (sampling(top_p=math.nan), "sampling.top_p"),
    (sampling(top_k=-1), "sampling.top_k"),
    (sampling(presence_penalty=2.5), "sampling.presence_penalty"),
    (sampling(presence_penalty=-2.5), "sampling.presence_penalty"),
    (sampling(seed=-1), "sampling.seed"),
    (sampling(max_tokens=0), "sampling.max_tokens"),
    (sampling(max_tokens=-5), "sampling.max_tokens"),
    (sampling(stop=["ok", ""]), "sampling.stop[1]"),
    (sampling(stop=["x" * (MAX_STOP_CHARS + 1)]), "sampling.stop[0]"),
    (sampling(stop=["."] * (MAX_STOPS + 1)), "sampling.stop"),
    ({"json_schema": '{"type": "foo"}'}, "json_schema"),
    ({"json_schema": '{"type": "string", "minLength": 40}', **sampling(max_tokens=30)}, "json_schema"),
    ({"regex": "(a"}, "regex"),
    ({"choices": iotd_pb2.Choices()}, "choices"),
    ({"choices": iotd_pb2.Choices(choices=["a", "b", "a"])}, "choices[2]"),
    ({"regex": "a", **sampling(stop=["."])}, "sampling.stop"),
    ({"regex": "a", **sampling(thinking=True)}, "sampling.thinking"),
]


@pytest.mark.parametrize(("fields", "path"), BAD_FIELDS, ids=[f"{n} {path}" for n, (_, path) in enumerate(BAD_FIELDS)])
def test_a_bad_field_is_named_by_its_path_and_never_reaches_the_engine(
    daemon: Daemon, stub: Any, fields: dict[str, Any], path: str
) -> None:
    code, status = failure(stub.Ask(iotd_pb2.AskRequest(**{"question": "why?", **fields})))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in details(status)["BadRequest"].field_violations] == [path]
    assert daemon.engine.tickets.empty()


BAD_CLASSIFY_FIELDS = [
    ({"question": ""}, "question"),
    ({"camera": "x" * 300}, "camera"),
    ({"images": [PNG, b"GIF89a"]}, "images[1]"),
    ({"budget": duration(0)}, "budget"),
    ({"labels": []}, "labels"),
    ({"labels": [str(n) for n in range(MAX_LABELS + 1)]}, "labels"),
    ({"labels": ["yes", ""]}, "labels[1]"),
    ({"labels": ["yes", "no", "yes"]}, "labels[2]"),
    ({"labels": ["x" * (MAX_LABEL_CHARS + 1)]}, "labels[0]"),
    ({"none_of_these": True, "length_normalized": True}, "none_of_these"),
    ({"temperature": 0}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": math.inf}, "temperature"),
    ({"temperature": math.nan}, "temperature"),
]


@pytest.mark.parametrize(
    ("fields", "path"), BAD_CLASSIFY_FIELDS, ids=[f"{n} {path}" for n, (_, path) in enumerate(BAD_CLASSIFY_FIELDS)]
)
def test_a_bad_field_of_a_classification_is_named_as_well(
    daemon: Daemon, stub: Any, fields: dict[str, Any], path: str
) -> None:
    request = iotd_pb2.ClassifyRequest(**{"question": "why?", "labels": ["yes", "no"], **fields})
    code, status = failure(stub.Classify(request) for _ in "1")
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in details(status)["BadRequest"].field_violations] == [path]
    assert path in status.message or path in ("question", "images[1]")
    assert daemon.engine.tickets.empty()
