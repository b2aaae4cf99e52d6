"""A small client of iotd's gRPC interface, sync and async. Knows nothing of the daemon's inside.

    from iotd.client import Client

    with Client("127.0.0.1:50551") as client:
        for piece in client.ask("Is a window open while it rains?", budget_s=5):
            print(piece, end="", flush=True)

Everything raises children of iotd.errors.IotdError, as the server names them.
"""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypedDict, Unpack

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from iotd import errors
from iotd.address import split_address
from iotd.events import (
    Accepted,
    Answered,
    CameraStatus,
    CostStatus,
    Done,
    EngineStatus,
    FinishReason,
    LinkStatus,
    Plan,
    ServerStatus,
    ServingState,
    Timings,
    Usage,
)
from iotd.tls import PemFile, check_authority, check_identity
from iotd.v1 import iotd_pb2, iotd_pb2_grpc

DEFAULT_TARGET = "127.0.0.1:50551"
SLACK_S = 2.0
"""The call's own deadline is the budget and this much: the server ends the answer, and its end still arrives."""
MAX_TIMEOUT_S = 86_400.0
"""Of a call: gRPC takes a much longer one for a deadline that has passed."""
STATUS_TIMEOUT_S = 5.0

Image = bytes | str | os.PathLike[str]
"""The content of a JPEG or PNG file, or the path of one."""

_OPTIONS = [
    # The daemon is on this machine or in this house: a proxy for the web is not on the way.
    ("grpc.enable_http_proxy", 0),
    # A daemon that vanished without a word is noticed within a minute.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]


class QuestionOptions(TypedDict, total=False):
    """What any question can be told. Left out or None: the server's default."""

    images: Sequence[Image]
    """Put before the question, in order."""
    camera: str | None
    """Its newest frame is put before the question."""
    budget_s: float | None
    """For the whole answer, from its arrival at the server."""
    use_context: bool
    """False asks the model alone, without the stream of readings and frames."""
    exact_readings: bool | None
    """Puts exact figures of the sensors that the question names before it."""
    sensors: Sequence[str]
    """The same for these sensors: labels, or patterns such as `* temperature`."""


class AskOptions(QuestionOptions, total=False):
    """What an ask can be told."""

    session: str | None
    """Goes on from an earlier answer: its `session`. Nothing is read again."""
    keep_session: bool | None
    """Keeps where the answer ends, so that another ask can go on from there."""
    catch_up: bool | None
    """With a session: reads what has come since, before the question."""
    json_schema: Mapping[str, Any] | str | None
    """The answer is JSON that is valid by this schema, wherever it ends. At most one of this and the next two."""
    regex: str | None
    """The whole answer matches this, in the syntax of Rust's regex crate."""
    choices: Sequence[str] | None
    """The answer is one of these."""
    temperature: float | None
    top_p: float | None
    top_k: int | None
    presence_penalty: float | None
    seed: int | None
    max_tokens: int | None
    stop: Sequence[str]
    thinking: bool | None


class ClassifyOptions(QuestionOptions, total=False):
    """What a classification can be told."""

    length_normalized: bool | None
    """Scores a label by its mean log probability for each token, so that long ones are not at a disadvantage."""
    none_of_these: bool | None
    """Tells, too, how probable it is that the answer begins with none of the labels."""
    temperature: float | None
    """Divides the scores; `iotd eval` says which makes them true on the whole."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, and how it came about."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    session: str = ""
    """What a further ask goes on from; empty unless this one was told to keep it."""
    thoughts: str = ""
    """What the model thought before it answered; empty unless this was told to, with `thinking`."""


@dataclass(frozen=True, slots=True)
class Classification:
    """How probable each label is, and how that came about."""

    probabilities: dict[str, float]
    """From 0 to 1 by label; with `none_probability`, where it was asked for, they add up to 1."""
    log_probabilities: dict[str, float]
    """The model's own by label, before any temperature; natural logarithms."""
    none_probability: float | None
    """That the answer begins with none of them; None unless it was asked for."""
    request_id: str
    usage: Usage
    timings: Timings

    @property
    def best(self) -> str | None:
        """The most probable label; None where that none of them is right is more probable still."""
        label = max(self.probabilities, key=self.probabilities.__getitem__)
        return label if self.probabilities[label] >= (self.none_probability or 0.0) else None


class _Stream:
    """One answer on its way: what its events leave behind, for both kinds of client."""

    def __init__(self, call: Any, target: str) -> None:  # Any: grpcio's calls have no public type in common
        self._call = call
        self._target = target
        self._cancelled = False
        self._pieces: list[str] = []
        self._thoughts: list[str] = []
        self.on_thought: Callable[[str], object] | None = None
        """Called with each piece of the model's thoughts; the iteration has those of the answer."""
        self.accepted: Accepted | None = None
        """Set before the first piece."""
        self.accepted_s = 0.0
        """When that arrived, on the monotonic clock."""
        self.done: Done | None = None
        """Set after the last piece."""
        self.done_s = 0.0
        """When that arrived, on the monotonic clock."""

    @property
    def thoughts(self) -> str:
        """The model's, so far."""
        return "".join(self._thoughts)

    @property
    def result(self) -> Answer:
        """The whole answer, once the stream has been read to its end. Raises Unavailable before."""
        if self.done is None:
            raise errors.Unavailable("the answer has not ended: read the stream to its end first")
        done = self.done
        text = "".join(self._pieces)
        return Answer(text, done.finish_reason, done.usage, done.timings, done.session, self.thoughts)

    def cancel(self) -> None:
        """Stop the model, if it still runs; the iteration ends."""
        self._cancelled = True
        self._call.cancel()

    def _take(self, event: iotd_pb2.AskEvent) -> str:
        match event.WhichOneof("event"):
            case "accepted":
                self.accepted, self.accepted_s = _accepted(event.accepted), time.monotonic()
            case "delta" if event.delta.thought:
                self._thoughts.append(event.delta.text)
                if self.on_thought is not None:
                    self.on_thought(event.delta.text)
            case "delta":
                self._pieces.append(event.delta.text)
                return event.delta.text
            case "done":
                self.done, self.done_s = _done(event.done), time.monotonic()
        return ""


class AnswerStream(_Stream):
    """Iterates, once, over the pieces of an answer. Leaving the loop or a `with` block stops the model."""

    def __iter__(self) -> Iterator[str]:
        try:
            for event in self._call:
                if piece := self._take(event):
                    yield piece
        except grpc.RpcError as error:
            if not self._cancelled:
                raise _error(error, self._target) from error
        finally:
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


class AsyncAnswerStream(_Stream):
    """Iterates, once, over the pieces of an answer. Leaving an `async with` block stops the model."""

    async def __aiter__(self) -> AsyncIterator[str]:
        try:
            async for event in self._call:
                if piece := self._take(event):
                    yield piece
        except asyncio.CancelledError:
            # grpc.aio raises it for a cancelled call as well as for a cancelled task.
            if not self._cancelled:
                raise
        except grpc.RpcError as error:
            raise _error(error, self._target) from error
        finally:
            self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()


class _Connection:
    """One channel to one daemon, for both kinds of client."""

    _library: ClassVar[Any] = grpc

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        tls: bool = False,
        ca_file: PemFile | None = None,
        cert_file: PemFile | None = None,
        key_file: PemFile | None = None,
    ) -> None:
        """target: host:port.

        ca_file: authority of the server's certificate; the system's where only `tls` is set. cert_file, key_file: what
        this client shows where the server wants to know it. Raises InvalidInput for a target or a file that is none.
        """
        _check_target(target)
        self._target = target
        credentials = _credentials(tls, ca_file, cert_file, key_file)
        if credentials is None:
            self._channel = self._library.insecure_channel(target, options=_OPTIONS)
        else:
            self._channel = self._library.secure_channel(target, credentials, options=_OPTIONS)
        self._stub: Any = iotd_pb2_grpc.IotdStub(self._channel)  # type: ignore[no-untyped-call] # generated


class Client(_Connection):
    """Asks one daemon, from any thread."""

    def ask(self, question: str, **options: Unpack[AskOptions]) -> AnswerStream:
        """Ask, and iterate over the pieces of the answer as they come; `result` has the rest.

        Raises IotdError while iterating, and InvalidInput at once for an image file that cannot be read.
        """
        request, timeout_s = _request(question, **options)
        return AnswerStream(self._stub.Ask(request, timeout=timeout_s), self._target)

    def answer(self, question: str, **options: Unpack[AskOptions]) -> Answer:
        """Ask, and wait for the whole answer. Raises IotdError."""
        stream = self.ask(question, **options)
        for _ in stream:
            pass
        return stream.result

    def classify(self, question: str, labels: Sequence[str], **options: Unpack[ClassifyOptions]) -> Classification:
        """How probable it is that the answer begins with each of the labels. Raises IotdError."""
        request, timeout_s = _classify_request(question, labels, **options)
        try:
            return _classification(self._stub.Classify(request, timeout=timeout_s))
        except grpc.RpcError as error:
            raise _error(error, self._target) from error

    def status(self, timeout_s: float = STATUS_TIMEOUT_S) -> ServerStatus:
        """What the daemon is doing. Raises IotdError."""
        try:
            return _status(self._stub.GetStatus(iotd_pb2.GetStatusRequest(), timeout=timeout_s))
        except grpc.RpcError as error:
            raise _error(error, self._target) from error

    def close(self) -> None:
        """Give the connection back; answers that still run are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(_Connection):
    """Asks one daemon, on one event loop."""

    _library: ClassVar[Any] = grpc.aio

    def ask(self, question: str, **options: Unpack[AskOptions]) -> AsyncAnswerStream:
        """Ask, and iterate over the pieces of the answer as they come; `result` has the rest.

        Raises IotdError while iterating, and InvalidInput at once for an image file that cannot be read.
        """
        request, timeout_s = _request(question, **options)
        return AsyncAnswerStream(self._stub.Ask(request, timeout=timeout_s), self._target)

    async def answer(self, question: str, **options: Unpack[AskOptions]) -> Answer:
        """Ask, and wait for the whole answer. Raises IotdError."""
        async with self.ask(question, **options) as stream:
            async for _ in stream:
                pass
        return stream.result

    async def classify(
        self, question: str, labels: Sequence[str], **options: Unpack[ClassifyOptions]
    ) -> Classification:
        """How probable it is that the answer begins with each of the labels. Raises IotdError."""
        request, timeout_s = _classify_request(question, labels, **options)
        try:
            return _classification(await self._stub.Classify(request, timeout=timeout_s))
        except grpc.RpcError as error:
            raise _error(error, self._target) from error

    async def status(self, timeout_s: float = STATUS_TIMEOUT_S) -> ServerStatus:
        """What the daemon is doing. Raises IotdError."""
        try:
            return _status(await self._stub.GetStatus(iotd_pb2.GetStatusRequest(), timeout=timeout_s))
        except grpc.RpcError as error:
            raise _error(error, self._target) from error

    async def close(self) -> None:
        """Give the connection back; answers that still run are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _check_target(target: str) -> None:
    try:
        split_address(target)
    except ValueError:
        raise errors.InvalidInput(
            f"the target is {target!r}: it must be HOST:PORT, such as {DEFAULT_TARGET}", field="target"
        ) from None


def _credentials(
    tls: bool, ca_file: PemFile | None, cert_file: PemFile | None, key_file: PemFile | None
) -> grpc.ChannelCredentials | None:
    """None without TLS. Raises InvalidInput for files that gRPC would end the process over."""
    if not (tls or ca_file or cert_file or key_file):
        return None
    if bool(cert_file) != bool(key_file):
        missing = "key_file" if cert_file else "cert_file"
        raise errors.InvalidInput(f"{missing} is missing: a certificate and its key go together", field=missing)
    ca, key, certificate = (_content(path) if path else None for path in (ca_file, key_file, cert_file))
    try:
        if ca_file:
            check_authority(ca_file)
        if cert_file and key_file:
            check_identity(cert_file, key_file)
    except ValueError as error:
        raise errors.InvalidInput(str(error)) from error
    return grpc.ssl_channel_credentials(ca, key, certificate)


def _request(
    question: str,
    *,
    session: str | None = None,
    keep_session: bool | None = None,
    catch_up: bool | None = None,
    json_schema: Mapping[str, Any] | str | None = None,
    regex: str | None = None,
    choices: Sequence[str] | None = None,
    **options: Any,
) -> tuple[iotd_pb2.AskRequest, float | None]:
    """The request, and the timeout of its call in seconds. Raises InvalidInput for what the proto cannot carry."""
    request = iotd_pb2.AskRequest()
    sampling = {name: options.pop(name) for name in [*options] if name not in QuestionOptions.__annotations__}
    timeout_s = _ask(request, question, **options)
    _fill(request, "", {"session": session, "keep_session": keep_session, "catch_up": catch_up})
    _fill(request.sampling, "sampling.", sampling)
    if sum(form is not None for form in (json_schema, regex, choices)) > 1:
        raise errors.InvalidInput("an answer has one form: json_schema, regex or choices", field="format")
    _fill(request, "", {"json_schema": _schema_text(json_schema), "regex": regex})
    if choices is not None:
        request.choices.SetInParent()
        _fill(request.choices, "", {"choices": choices})
    return request, timeout_s


def _classify_request(
    question: str,
    labels: Sequence[str],
    *,
    length_normalized: bool | None = None,
    none_of_these: bool | None = None,
    temperature: float | None = None,
    **options: Any,
) -> tuple[iotd_pb2.ClassifyRequest, float | None]:
    """As `_request`."""
    request = iotd_pb2.ClassifyRequest()
    timeout_s = _ask(request, question, **options)
    _fill(request, "", {"labels": labels, "temperature": temperature})
    _fill(request, "", {"length_normalized": length_normalized, "none_of_these": none_of_these})
    return request, timeout_s


def _ask(
    request: iotd_pb2.AskRequest | iotd_pb2.ClassifyRequest,
    question: str,
    *,
    images: Sequence[Image] = (),
    camera: str | None = None,
    budget_s: float | None = None,
    use_context: bool = True,
    exact_readings: bool | None = None,
    sensors: Sequence[str] = (),
) -> float | None:
    """Fill in the question. Returns the timeout of the call in seconds."""
    contents = [image if isinstance(image, bytes) else _content(image) for image in images]
    _fill(request, "", {"question": question, "images": contents, "camera": camera, "use_context": use_context})
    _fill(request, "", {"exact_readings": exact_readings, "sensors": sensors})
    if budget_s is None:
        return None
    try:
        request.budget.FromNanoseconds(round(budget_s * 1e9))
    except (ValueError, OverflowError) as error:
        raise errors.InvalidInput(f"budget is {budget_s} s: that is no time", field="budget") from error
    return min(max(0.0, budget_s) + SLACK_S, MAX_TIMEOUT_S)


def _fill(message: Message, path: str, values: Mapping[str, Any]) -> None:
    """Set the fields whose value is not None. Raises InvalidInput naming the one that the proto refuses."""
    for name, value in values.items():
        if value is None:
            continue
        try:
            message.MergeFrom(type(message)(**{name: value}))
        except (TypeError, ValueError) as error:
            shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
            why = "is no valid text" if isinstance(error, UnicodeError) else "is not allowed"
            raise errors.InvalidInput(f"{path}{name}: {shown} {why}", field=path + name) from error


def _schema_text(schema: Mapping[str, Any] | str | None) -> str | None:
    if schema is None or isinstance(schema, str):
        return schema
    try:
        return json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise errors.InvalidInput(f"json_schema: {error}", field="json_schema") from error


def _content(path: PemFile) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise errors.InvalidInput(f"{path} cannot be read: {error.strerror}") from error


def _accepted(accepted: iotd_pb2.AskAccepted) -> Accepted:
    plan = accepted.plan
    tokens = plan.answer_tokens, plan.reserved_tokens, plan.thinking_tokens, plan.image_tokens
    return Accepted(accepted.request_id, accepted.queue_position, Plan(*tokens, _timings(plan.predicted)))


def _done(done: iotd_pb2.AskDone) -> Done:
    return Done(
        _FINISH_REASONS.get(done.finish_reason, FinishReason.STOP),
        _usage(done.usage),
        _timings(done.timings),
        done.session,
    )


def _classification(response: iotd_pb2.ClassifyResponse) -> Classification:
    return Classification(
        probabilities={each.label: each.probability for each in response.labels},
        log_probabilities={each.label: each.log_probability for each in response.labels},
        none_probability=response.none_probability if response.HasField("none_probability") else None,
        request_id=response.request_id,
        usage=_usage(response.usage),
        timings=_timings(response.timings),
    )


def _usage(usage: iotd_pb2.Usage) -> Usage:
    return Usage(usage.context_tokens, usage.prompt_tokens, usage.image_tokens, usage.generation_tokens)


def _timings(timings: iotd_pb2.Timings) -> Timings:
    return Timings(
        queue_s=_seconds(timings.queue),
        image_s=_seconds(timings.image),
        prefill_s=_seconds(timings.prefill),
        decode_s=_seconds(timings.decode),
        first_token_s=_seconds(timings.first_token),
        total_s=_seconds(timings.total),
    )


def _answered(answer: iotd_pb2.AnswerSummary) -> Answered:
    usage, timings = _usage(answer.usage), _timings(answer.timings)
    budget_s, predicted_s = _seconds(answer.budget), _seconds(answer.predicted)
    return Answered(answer.request_id, answer.outcome, budget_s, usage, timings, predicted_s)


def _costs(costs: iotd_pb2.CostStatus) -> CostStatus:
    return CostStatus(
        fork_s=_seconds(costs.fork),
        prefill_run_s=_seconds(costs.prefill_run),
        prefill_token_s=_seconds(costs.prefill_token),
        decode_token_s=_seconds(costs.decode_token),
        slow_decode_token_s=_seconds(costs.slow_decode_token),
        image_token_s=_seconds(costs.image_token),
        predictions=costs.predictions,
        median_error=costs.median_error,
        high_error=costs.high_error,
        slow_refusal_s=_seconds(costs.slow_refusal),
    )


# A number that a newer server sends and this client does not know falls back to the first of each kind.
_FINISH_REASONS = {iotd_pb2.FinishReason.Value(f"FINISH_REASON_{reason.name}"): reason for reason in FinishReason}
_SERVING_STATES = {iotd_pb2.ServingState.Value(f"SERVING_STATE_{state.name}"): state for state in ServingState}


def _status(response: iotd_pb2.GetStatusResponse) -> ServerStatus:
    state = _SERVING_STATES.get(response.state, ServingState.LOADING)
    engine = EngineStatus(
        model=response.model,
        ready=state is ServingState.SERVING,
        context_tokens=response.context.tokens,
        context_window=response.context.window_tokens,
        oldest_event_s=_seconds(response.context.oldest_event_time),
        newest_event_s=_seconds(response.context.newest_event_time),
        queue_depth=response.queue_depth,
        backlog=response.backlog,
        state_nbytes=response.state_bytes,
        forks=response.forks_in_use,
        sessions=response.sessions,
        readings=dict(response.readings_by_sensor),
        cameras=tuple(map(_camera, response.cameras)),
        recent=tuple(map(_answered, response.recent_answers)),
        counters=dict(response.counters),
        costs=_costs(response.costs),
    )
    link = _link(response.mqtt) if response.HasField("mqtt") else None
    temperature_c = response.soc_temperature_celsius if response.HasField("soc_temperature_celsius") else None
    uptime_s, resident = _seconds(response.uptime), response.resident_memory_bytes
    return ServerStatus(response.version, state, uptime_s, resident, temperature_c, engine, link)


def _camera(camera: iotd_pb2.CameraStatus) -> CameraStatus:
    newest_s = _seconds(camera.newest_frame_time)
    return CameraStatus(camera.camera, newest_s, camera.frames, camera.replaced_frames, camera.refused_frames)


def _link(mqtt: iotd_pb2.MqttStatus) -> LinkStatus:
    return LinkStatus(mqtt.connected, mqtt.broker, mqtt.protocol, mqtt.reconnects, dict(mqtt.counters))


def _seconds(time: Duration | Timestamp) -> float:
    return time.seconds + time.nanos / 1e9


def _error(rpc: Any, target: str) -> errors.IotdError:
    """What the call failed with. rpc: a grpc.RpcError, whose code, details and trailers its type does not show."""
    for key, value in rpc.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            return _named_error(Status.FromString(value))
    return _transport_error(rpc.code(), rpc.details() or "", target)


_KINDS = {
    kind.reason: kind
    for kind in (
        errors.DeadlineExceeded,
        errors.NotFound,
        errors.PackageError,
        errors.PermissionDenied,
        errors.StateMismatch,
        errors.Unauthenticated,
    )
}


def _named_error(status: Status) -> errors.IotdError:
    """The error that the server raised."""
    info, bad_request, retry = ErrorInfo(), BadRequest(), RetryInfo()
    for detail in status.details:
        _ = detail.Unpack(info) or detail.Unpack(bad_request) or detail.Unpack(retry)
    message, reason = status.message, info.reason
    if bad_request.field_violations:
        return errors.InvalidInput(message, field=bad_request.field_violations[0].field)
    if reason == errors.Overloaded.reason:
        needed = info.metadata.get("neededSeconds")
        needed_s = float(needed) if needed else None
        return errors.Overloaded(message, retry_after_s=_seconds(retry.retry_delay), needed_s=needed_s)
    if reason == errors.Unavailable.reason:
        return errors.Unavailable(message, retry_after_s=_seconds(retry.retry_delay))
    return _KINDS.get(reason, errors.Internal)(message)


def _transport_error(code: grpc.StatusCode, details: str, target: str) -> errors.IotdError:
    """The error of gRPC itself: no iotd has answered."""
    match code:
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.DeadlineExceeded(f"no answer from {target} in time")
        case grpc.StatusCode.UNIMPLEMENTED:
            return errors.Unavailable(f"{target} speaks gRPC, but it is no iotd or an older one: is the target right?")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return errors.InvalidInput(f"{target} does not take so large a request: send smaller images ({details})")
        case grpc.StatusCode.UNAVAILABLE:
            return errors.Unavailable(
                f"no iotd reached at {target}: start `iotd serve` there, or check its grpc.listen, its TLS settings "
                f"and the firewall ({details})"
            )
    return errors.Internal(f"the call to {target} failed: {code.name}: {details}")
