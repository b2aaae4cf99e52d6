"""What moves between the parts: readings, frames, asks and the events of an answer. Plain data, with units.

Knows no socket, no model and no clock: whoever makes an event fills in its times.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from iotd.errors import IotdError

RGB = NDArray[np.uint8]
"""An image, uint8 [H, W, 3], channels in the order red, green, blue."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One line of sensor text, such as `23.4 °C` from `kitchen temperature`."""

    source: str
    """Label of the sensor, free of line breaks."""
    text: str
    """The value with its unit, free of line breaks."""
    time_s: float
    """When it arrived, seconds since the Unix epoch."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One camera image."""

    camera: str
    """Label of the camera, by which an ask names it."""
    rgb: RGB
    time_s: float
    """When it arrived, seconds since the Unix epoch."""


Observation = Reading | Frame

MAX_CAMERAS = 64
"""Cameras kept apart at once; one more, and the one silent for longest is forgotten."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How a thought's next token is drawn; as in Sampling."""

    temperature: float
    top_p: float
    top_k: int
    presence_penalty: float


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. `temperature` 0 takes the most likely one."""

    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int = 20
    """0 keeps the whole vocabulary."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token already generated but digits, which come again by nature. In an answer, those
    of its thought do not count."""
    seed: int | None = None
    """The same seed, prompt and package give the same text; None draws one."""
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    thinking: bool = False
    thoughts: Draw | None = None
    """How thoughts are drawn, where it is not as the answer is."""


@dataclass(frozen=True, slots=True)
class Format:
    """The form that an answer must have."""

    kind: Literal["json_schema", "regex", "choices"]
    """Also the name of the request's field."""
    texts: tuple[str, ...]
    """The schema or the expression; or the choices, one of which is the answer."""


@dataclass(frozen=True, slots=True)
class Labels:
    """Answers to weigh against each other, in place of one answer."""

    texts: tuple[str, ...]
    """All different, as the model would begin its answer with them."""
    length_normalized: bool = False
    """A label's score is its mean log probability for each of its tokens, not their sum."""
    none_of_these: bool = False
    """Weigh in that the answer begins with none of them; not with `length_normalized`."""
    temperature: float = 1.0
    """Divides the scores; above zero."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One question, with everything needed to answer it."""

    question: str
    arrived_s: float
    """When the request arrived, on the monotonic clock (time.monotonic)."""
    deadline_s: float
    """When its answer must have ended, on the monotonic clock."""
    images: tuple[RGB, ...] = ()
    camera: str | None = None
    """Puts the newest frame of this camera before the question."""
    use_context: bool = True
    """Ask over the warm stream of readings and frames; False asks the model alone."""
    session: str | None = None
    """Go on from where this earlier answer was kept; `use_context` then means nothing."""
    keep_session: bool = False
    """Keep where this answer ends, so that another ask can go on from there."""
    catch_up: bool = False
    """With a session: read what the context has read since, before the question."""
    exact_readings: bool = False
    """Put the exact figures of the sensors it concerns before the question."""
    sensors: tuple[str, ...] = ()
    """Which these are: labels or patterns; empty takes those that the question names."""
    sampling: Sampling = field(default_factory=Sampling)
    format: Format | None = None
    """The answer has this form, wherever it ends; then without thinking and stop strings."""
    labels: Labels | None = None
    """Weigh these in place of an answer; then without session, format and thinking."""


class FinishReason(Enum):
    """Why an answer ended."""

    STOP = "stop"
    """The model ended its turn, a stop string was met, or the answer's form was complete."""
    LENGTH = "length"
    """`max_tokens` were generated, or the context was full."""
    BUDGET = "budget"
    """The deadline came with some answer already given."""
    CANCELLED = "cancelled"
    """The caller went away."""
    REPETITION = "repetition"
    """The answer went round in circles."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens an answer took."""

    context_tokens: int = 0
    """Already in the warm context: these cost nothing."""
    prompt_tokens: int = 0
    """Prefilled for this ask, image tokens included."""
    image_tokens: int = 0
    generation_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of an answer went, in seconds."""

    queue_s: float = 0.0
    image_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    first_token_s: float = 0.0
    """From arrival to the first piece of text; 0 where there was none."""
    total_s: float = 0.0
    """From arrival to the end of the answer."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How an answer is to fit into its budget."""

    answer_tokens: int = 0
    """That there is time for as things stand, thoughts not counted: `max_tokens` at most."""
    reserved_tokens: int = 0
    """Of these, those that are kept for it whatever else is asked meanwhile."""
    thinking_tokens: int = 0
    """That there is time for besides."""
    image_tokens: int = 0
    predicted: Timings = Timings()
    """What it takes to be ready with all these tokens."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The ask is in the queue."""

    request_id: str
    queue_position: int
    """Asks in front of this one, the running one included."""
    plan: Plan = Plan()


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer: valid UTF-8, never a part of a character."""

    text: str
    thought: bool = False
    """It is a piece of the model's thoughts, which come before its answer."""


@dataclass(frozen=True, slots=True)
class LabelScore:
    """How probable one label is."""

    label: str
    probability: float
    """From 0 to 1, after the temperature; of all labels, and of none of them where that was weighed in, 1."""
    log_probability: float
    """Natural logarithm of the model's own probability that the answer begins with it, and with no longer label that
    it begins; divided by its tokens where that was asked for. Before the temperature."""


@dataclass(frozen=True, slots=True)
class Weighed:
    """Labels weighed against each other."""

    labels: tuple[LabelScore, ...]
    none_probability: float | None = None
    """That the answer begins with none of them; None where that was not weighed in."""


@dataclass(frozen=True, slots=True)
class Done:
    """The answer ended well; nothing follows."""

    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    session: str = ""
    """By which another ask can go on from here; empty where it was not kept."""
    weighed: Weighed | None = None
    """Of an ask with labels, unless it was cancelled."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The answer ended with an error; nothing follows."""

    error: IotdError


@dataclass(frozen=True, slots=True)
class Answered:
    """How one ask ended, without its words."""

    request_id: str
    outcome: str
    """The finish reason's value, or the error's code."""
    budget_s: float
    usage: Usage
    timings: Timings
    """All 0 where it failed."""
    predicted_s: float = 0.0
    """What the whole was predicted to take, from its arrival, for as many tokens as it came to; 0 where it failed."""


AnswerEvent = Accepted | Delta | Done | Failed


FORGOTTEN = "(forgotten)"
"""Stands for the sensors and cameras that had to make way for others, where counts are told by name."""


@dataclass(frozen=True, slots=True)
class CameraStatus:
    """What came of one camera's frames since it was first heard."""

    camera: str
    newest_s: float
    """Unix time of its newest frame."""
    frames: int
    replaced: int
    """Frames that were not read as a newer one took their place."""
    refused: int
    """Frames that were not read as they do not fit into the context."""


@dataclass(frozen=True, slots=True)
class CostStatus:
    """What work takes on this machine, as plans are made with it; tokens at the context's present length."""

    fork_s: float = 0.0
    prefill_run_s: float = 0.0
    """Each run that reads tokens, besides the tokens themselves."""
    prefill_token_s: float = 0.0
    decode_token_s: float = 0.0
    """The median."""
    slow_decode_token_s: float = 0.0
    """95 of 100 take less."""
    image_token_s: float = 0.0
    """An image, for each of its tokens; 0 where none was encoded."""
    predictions: int = 0
    """Asks that ended of late, whose times the next two are about."""
    median_error: float = 0.0
    """How far the predicted time of a whole answer was off what it took, as a part of that."""
    high_error: float = 0.0
    """The same: 95 of 100 were off by less."""
    slow_refusal_s: float = 0.0
    """From an ask's arrival to its refusal for want of time: 99 of the last 100 took less. 0 where none was refused."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What the engine is doing, at one moment."""

    model: str
    ready: bool
    context_tokens: int
    context_window: int
    oldest_event_s: float
    """Unix time of the oldest event in the context; 0 where it is empty."""
    newest_event_s: float
    queue_depth: int
    """Asks waiting or running."""
    backlog: int
    """Readings and frames not yet read into the context."""
    state_nbytes: int
    forks: int
    """Copies of a state on which asks are being answered."""
    sessions: int
    """Conversations that can be gone on with."""
    readings: dict[str, int]
    """Heard of each sensor that is remembered, and of all others under FORGOTTEN."""
    cameras: tuple[CameraStatus, ...]
    """Those that are remembered, the one heard last at the end; before them FORGOTTEN, for all others."""
    recent: tuple[Answered, ...]
    """The asks that ended last, the newest at the end."""
    counters: dict[str, int]
    """Monotonic counts since start: readings, frames, dropped_readings, dropped_frames, context_swaps, asks,
    prompt_tokens, generation_tokens, and so on."""
    costs: CostStatus = CostStatus()


@dataclass(frozen=True, slots=True)
class LinkStatus:
    """What the link to the broker is doing, at one moment."""

    connected: bool
    broker: str
    """`host:port`; empty where no broker is configured."""
    protocol: str
    """`5` or `3.1.1`; empty until connected."""
    reconnects: int
    counters: dict[str, int]
    """Monotonic counts since start: messages, readings, frames, and each kind of drop."""


class ServingState(Enum):
    """Whether questions are taken."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    """Running questions end, new ones are refused."""


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """What the daemon is doing, at one moment: what GetStatus answers."""

    version: str
    state: ServingState
    uptime_s: float
    resident_nbytes: int
    temperature_c: float | None
    """Of the processor; None where the board does not tell."""
    engine: EngineStatus
    link: LinkStatus | None
    """None where no broker is configured."""
