"""An AskRequest or a ClassifyRequest as an Ask: checks every field, and names the one at fault by its path.

Knows no clock and no model; times are handed in, on the monotonic clock.
"""

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace

from iotd.config import AskConfig
from iotd.errors import InvalidInput
from iotd.events import RGB, Ask, Format, Labels, Sampling
from iotd.model.sampling import sampling_of
from iotd.rpc.times import seconds
from iotd.v1 import iotd_pb2

MAX_QUESTION_CHARS = 16_384
"""More than the positions of any window for a board; the exact limit in tokens is the engine's to tell."""
MAX_STOPS = 16
MAX_STOP_CHARS = 128
MAX_CAMERA_CHARS = 256
MAX_SENSOR_PATTERNS = 32
MAX_LABELS = 64
MAX_LABEL_CHARS = 256
REPLY_S, REPLY_SHARE = 0.012, 0.5
"""Kept off a budget for the way there and back, and no more than this part of it: it counts at the caller. The way
takes 3 ms on the loopback, and what a busy machine adds to it."""
REPLY_MARGIN_S = 0.025
"""Kept off the caller's gRPC deadline: past it, its library throws the answer away, so the last message must have
crossed the network and its event loop by then (a few ms on a LAN, more over busy Wi-Fi)."""

NOTHING_DRAWN = Sampling(max_tokens=1)
"""Of an ask with labels: a plan for it need not leave time for an answer."""

Request = iotd_pb2.AskRequest | iotd_pb2.ClassifyRequest


def deadline_s(request: Request, arrived_s: float, remaining_s: float | None, limits: AskConfig) -> float:
    """When the answer must have ended: arrival plus the smallest of budget, server's maximum and gRPC deadline.

    remaining_s: until the call's gRPC deadline, None where it has none.
    Raises InvalidInput unless the budget is above zero.
    """
    allowed_s = budget_s(request, limits)
    allowed_s -= min(REPLY_S, REPLY_SHARE * allowed_s)
    if remaining_s is not None:
        allowed_s = min(allowed_s, max(0.0, remaining_s - REPLY_MARGIN_S))
    return arrived_s + allowed_s


def budget_for(needed_s: float) -> float:
    """The budget of which so much is left, once the way there and back is kept off it."""
    return needed_s + min(REPLY_S, needed_s * REPLY_SHARE / (1 - REPLY_SHARE))


def budget_s(request: Request, limits: AskConfig) -> float:
    """The caller's budget, or the default, up to the server's maximum. Raises InvalidInput unless it is above zero."""
    asked_s = seconds(request.budget) if request.HasField("budget") else limits.budget_s
    if not asked_s > 0:
        raise InvalidInput(f"budget is {asked_s:g} s: it must be above zero", field="budget")
    return min(asked_s, limits.max_budget_s)


def parse(request: Request, arrived_s: float, ends_s: float, limits: AskConfig) -> Ask:
    """The ask without its images, and with a format that has not been compiled. Raises InvalidInput."""
    ask = _question(request, arrived_s, ends_s, limits)
    if isinstance(request, iotd_pb2.ClassifyRequest):
        return replace(ask, labels=_labels(request), sampling=NOTHING_DRAWN)
    if request.catch_up and not request.session:
        raise InvalidInput("catch_up is for a question that goes on from a session", field="catch_up")
    form, sampling = _format(request), _sampling(request, limits)
    if form is not None and (sampling.stop or sampling.thinking):
        name = "stop" if sampling.stop else "thinking"
        raise InvalidInput(f"{name} is for free text: it does not go with {form.kind}", field=f"sampling.{name}")
    return replace(
        ask,
        session=request.session or None,
        keep_session=request.keep_session,
        catch_up=request.catch_up,
        sampling=sampling,
        format=form,
    )


def _question(request: Request, arrived_s: float, ends_s: float, limits: AskConfig) -> Ask:
    """What every kind of request has."""
    _check_question(request.question)
    _check_size("camera", len(request.camera), MAX_CAMERA_CHARS, " characters")
    _check_size("sensors", len(request.sensors), MAX_SENSOR_PATTERNS, "")
    for index, pattern in enumerate(request.sensors):
        _check_size(f"sensors[{index}]", len(pattern), MAX_CAMERA_CHARS, " characters")
    _check_size("images", len(request.images), limits.max_images, "")
    return Ask(
        question=request.question,
        arrived_s=arrived_s,
        deadline_s=ends_s,
        camera=request.camera or None,
        use_context=request.use_context if request.HasField("use_context") else True,
        exact_readings=request.exact_readings or bool(request.sensors),
        sensors=tuple(request.sensors),
    )


async def decode_images(images: list[bytes], decode: Callable[[bytes], RGB]) -> tuple[RGB, ...]:
    """Decode one after the other in a worker thread. Raises InvalidInput with the path of the image at fault."""
    decoded = []
    for index, data in enumerate(images):
        try:
            decoded.append(await asyncio.to_thread(decode, data))
        except InvalidInput as error:
            raise InvalidInput(str(error), field=f"images[{index}]") from error
    return tuple(decoded)


def _check_question(question: str) -> None:
    if not question.strip():
        raise InvalidInput("the question is empty: say what you want to know", field="question")
    _check_size("question", len(question), MAX_QUESTION_CHARS, " characters")


def _check_size(field: str, size: int, limit: int, unit: str) -> None:
    if size > limit:
        raise InvalidInput(f"{field}: {size}{unit} given, at most {limit} taken", field=field)


def _labels(request: iotd_pb2.ClassifyRequest) -> Labels:
    texts = tuple(request.labels)
    if not texts:
        raise InvalidInput("labels: there is nothing to choose from", field="labels")
    _check_size("labels", len(texts), MAX_LABELS, "")
    for index, text in enumerate(texts):
        field = f"labels[{index}]"
        if not text:
            raise InvalidInput(f"{field} is empty: every answer begins with that", field=field)
        _check_size(field, len(text), MAX_LABEL_CHARS, " characters")
        if (first := texts.index(text)) < index:
            raise InvalidInput(f"{field} is labels[{first}] again: give each label once", field=field)
    if request.none_of_these and request.length_normalized:
        raise InvalidInput(
            "none_of_these does not go with length_normalized: such scores are no part of 1", field="none_of_these"
        )
    temperature = request.temperature if request.HasField("temperature") else 1.0
    if not 0 < temperature < math.inf:
        raise InvalidInput(f"temperature is {temperature:g}: it must be above 0 and finite", field="temperature")
    return Labels(texts, request.length_normalized, request.none_of_these, temperature)


def _format(request: iotd_pb2.AskRequest) -> Format | None:
    match request.WhichOneof("format"):
        case None:
            return None
        case "choices":
            return Format("choices", tuple(request.choices.choices))
        case kind:
            return Format(kind, (getattr(request, kind),))


def _sampling(request: iotd_pb2.AskRequest, limits: AskConfig) -> Sampling:
    options, stop = request.sampling, tuple(request.sampling.stop)
    _check_stops(stop)
    defaults = Sampling(
        max_tokens=limits.max_tokens,
        temperature=limits.temperature,
        presence_penalty=limits.presence_penalty,
        stop=stop,
    )
    given = {field.name: value for field, value in options.ListFields() if field.name != "stop"}
    return sampling_of(defaults, given, images=bool(request.images or request.camera))


def _check_stops(stops: tuple[str, ...]) -> None:
    _check_size("sampling.stop", len(stops), MAX_STOPS, "")
    for index, stop in enumerate(stops):
        field = f"sampling.stop[{index}]"
        if not stop:
            raise InvalidInput("a stop string is empty: it would end every answer at once", field=field)
        _check_size(field, len(stop), MAX_STOP_CHARS, " characters")
