import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_BUDGET: _ClassVar[FinishReason]
    FINISH_REASON_CANCELLED: _ClassVar[FinishReason]
    FINISH_REASON_REPETITION: _ClassVar[FinishReason]

class ServingState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SERVING_STATE_UNSPECIFIED: _ClassVar[ServingState]
    SERVING_STATE_LOADING: _ClassVar[ServingState]
    SERVING_STATE_SERVING: _ClassVar[ServingState]
    SERVING_STATE_DRAINING: _ClassVar[ServingState]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_BUDGET: FinishReason
FINISH_REASON_CANCELLED: FinishReason
FINISH_REASON_REPETITION: FinishReason
SERVING_STATE_UNSPECIFIED: ServingState
SERVING_STATE_LOADING: ServingState
SERVING_STATE_SERVING: ServingState
SERVING_STATE_DRAINING: ServingState

class AskRequest(_message.Message):
    __slots__ = ("question", "images", "camera", "budget", "use_context", "sampling", "session", "keep_session", "catch_up", "exact_readings", "sensors", "json_schema", "regex", "choices")
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    CAMERA_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    USE_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    KEEP_SESSION_FIELD_NUMBER: _ClassVar[int]
    CATCH_UP_FIELD_NUMBER: _ClassVar[int]
    EXACT_READINGS_FIELD_NUMBER: _ClassVar[int]
    SENSORS_FIELD_NUMBER: _ClassVar[int]
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    REGEX_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    question: str
    images: _containers.RepeatedScalarFieldContainer[bytes]
    camera: str
    budget: _duration_pb2.Duration
    use_context: bool
    sampling: SamplingOptions
    session: str
    keep_session: bool
    catch_up: bool
    exact_readings: bool
    sensors: _containers.RepeatedScalarFieldContainer[str]
    json_schema: str
    regex: str
    choices: Choices
    def __init__(self, question: _Optional[str] = ..., images: _Optional[_Iterable[bytes]] = ..., camera: _Optional[str] = ..., budget: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., use_context: bool = ..., sampling: _Optional[_Union[SamplingOptions, _Mapping]] = ..., session: _Optional[str] = ..., keep_session: bool = ..., catch_up: bool = ..., exact_readings: bool = ..., sensors: _Optional[_Iterable[str]] = ..., json_schema: _Optional[str] = ..., regex: _Optional[str] = ..., choices: _Optional[_Union[Choices, _Mapping]] = ...) -> None: ...

class Choices(_message.Message):
    __slots__ = ("choices",)
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    choices: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, choices: _Optional[_Iterable[str]] = ...) -> None: ...

class SamplingOptions(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "presence_penalty", "seed", "max_tokens", "stop", "thinking")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    THINKING_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    presence_penalty: float
    seed: int
    max_tokens: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    thinking: bool
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., presence_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., max_tokens: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., thinking: bool = ...) -> None: ...

class AskEvent(_message.Message):
    __slots__ = ("accepted", "delta", "done")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    accepted: AskAccepted
    delta: AskDelta
    done: AskDone
    def __init__(self, accepted: _Optional[_Union[AskAccepted, _Mapping]] = ..., delta: _Optional[_Union[AskDelta, _Mapping]] = ..., done: _Optional[_Union[AskDone, _Mapping]] = ...) -> None: ...

class AskAccepted(_message.Message):
    __slots__ = ("request_id", "queue_position", "plan")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    QUEUE_POSITION_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    queue_position: int
    plan: Plan
    def __init__(self, request_id: _Optional[str] = ..., queue_position: _Optional[int] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("answer_tokens", "reserved_tokens", "thinking_tokens", "image_tokens", "predicted")
    ANSWER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESERVED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    THINKING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_FIELD_NUMBER: _ClassVar[int]
    answer_tokens: int
    reserved_tokens: int
    thinking_tokens: int
    image_tokens: int
    predicted: Timings
    def __init__(self, answer_tokens: _Optional[int] = ..., reserved_tokens: _Optional[int] = ..., thinking_tokens: _Optional[int] = ..., image_tokens: _Optional[int] = ..., predicted: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class AskDelta(_message.Message):
    __slots__ = ("text", "thought")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    THOUGHT_FIELD_NUMBER: _ClassVar[int]
    text: str
    thought: bool
    def __init__(self, text: _Optional[str] = ..., thought: bool = ...) -> None: ...

class AskDone(_message.Message):
    __slots__ = ("finish_reason", "usage", "timings", "session")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    session: str
    def __init__(self, finish_reason: _Optional[_Union[FinishReason, str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., session: _Optional[str] = ...) -> None: ...

class ClassifyRequest(_message.Message):
    __slots__ = ("question", "labels", "images", "camera", "budget", "use_context", "exact_readings", "sensors", "length_normalized", "none_of_these", "temperature")
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    CAMERA_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    USE_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    EXACT_READINGS_FIELD_NUMBER: _ClassVar[int]
    SENSORS_FIELD_NUMBER: _ClassVar[int]
    LENGTH_NORMALIZED_FIELD_NUMBER: _ClassVar[int]
    NONE_OF_THESE_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    question: str
    labels: _containers.RepeatedScalarFieldContainer[str]
    images: _containers.RepeatedScalarFieldContainer[bytes]
    camera: str
    budget: _duration_pb2.Duration
    use_context: bool
    exact_readings: bool
    sensors: _containers.RepeatedScalarFieldContainer[str]
    length_normalized: bool
    none_of_these: bool
    temperature: float
    def __init__(self, question: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ..., images: _Optional[_Iterable[bytes]] = ..., camera: _Optional[str] = ..., budget: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., use_context: bool = ..., exact_readings: bool = ..., sensors: _Optional[_Iterable[str]] = ..., length_normalized: bool = ..., none_of_these: bool = ..., temperature: _Optional[float] = ...) -> None: ...

class ClassifyResponse(_message.Message):
    __slots__ = ("labels", "none_probability", "request_id", "usage", "timings")
    LABELS_FIELD_NUMBER: _ClassVar[int]
    NONE_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    labels: _containers.RepeatedCompositeFieldContainer[LabelProbability]
    none_probability: float
    request_id: str
    usage: Usage
    timings: Timings
    def __init__(self, labels: _Optional[_Iterable[_Union[LabelProbability, _Mapping]]] = ..., none_probability: _Optional[float] = ..., request_id: _Optional[str] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class LabelProbability(_message.Message):
    __slots__ = ("label", "probability", "log_probability")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    LOG_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    label: str
    probability: float
    log_probability: float
    def __init__(self, label: _Optional[str] = ..., probability: _Optional[float] = ..., log_probability: _Optional[float] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("context_tokens", "prompt_tokens", "image_tokens", "generation_tokens")
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    context_tokens: int
    prompt_tokens: int
    image_tokens: int
    generation_tokens: int
    def __init__(self, context_tokens: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., image_tokens: _Optional[int] = ..., generation_tokens: _Optional[int] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue", "image", "prefill", "decode", "first_token", "total")
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    queue: _duration_pb2.Duration
    image: _duration_pb2.Duration
    prefill: _duration_pb2.Duration
    decode: _duration_pb2.Duration
    first_token: _duration_pb2.Duration
    total: _duration_pb2.Duration
    def __init__(self, queue: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., image: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., prefill: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., decode: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., first_token: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., total: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("version", "model", "state", "uptime", "context", "queue_depth", "backlog", "state_bytes", "resident_memory_bytes", "mqtt", "counters", "sessions", "recent_answers", "soc_temperature_celsius", "forks_in_use", "readings_by_sensor", "cameras", "costs")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class ReadingsBySensorEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    UPTIME_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    QUEUE_DEPTH_FIELD_NUMBER: _ClassVar[int]
    BACKLOG_FIELD_NUMBER: _ClassVar[int]
    STATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MQTT_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    RECENT_ANSWERS_FIELD_NUMBER: _ClassVar[int]
    SOC_TEMPERATURE_CELSIUS_FIELD_NUMBER: _ClassVar[int]
    FORKS_IN_USE_FIELD_NUMBER: _ClassVar[int]
    READINGS_BY_SENSOR_FIELD_NUMBER: _ClassVar[int]
    CAMERAS_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    version: str
    model: str
    state: ServingState
    uptime: _duration_pb2.Duration
    context: ContextStatus
    queue_depth: int
    backlog: int
    state_bytes: int
    resident_memory_bytes: int
    mqtt: MqttStatus
    counters: _containers.ScalarMap[str, int]
    sessions: int
    recent_answers: _containers.RepeatedCompositeFieldContainer[AnswerSummary]
    soc_temperature_celsius: float
    forks_in_use: int
    readings_by_sensor: _containers.ScalarMap[str, int]
    cameras: _containers.RepeatedCompositeFieldContainer[CameraStatus]
    costs: CostStatus
    def __init__(self, version: _Optional[str] = ..., model: _Optional[str] = ..., state: _Optional[_Union[ServingState, str]] = ..., uptime: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., context: _Optional[_Union[ContextStatus, _Mapping]] = ..., queue_depth: _Optional[int] = ..., backlog: _Optional[int] = ..., state_bytes: _Optional[int] = ..., resident_memory_bytes: _Optional[int] = ..., mqtt: _Optional[_Union[MqttStatus, _Mapping]] = ..., counters: _Optional[_Mapping[str, int]] = ..., sessions: _Optional[int] = ..., recent_answers: _Optional[_Iterable[_Union[AnswerSummary, _Mapping]]] = ..., soc_temperature_celsius: _Optional[float] = ..., forks_in_use: _Optional[int] = ..., readings_by_sensor: _Optional[_Mapping[str, int]] = ..., cameras: _Optional[_Iterable[_Union[CameraStatus, _Mapping]]] = ..., costs: _Optional[_Union[CostStatus, _Mapping]] = ...) -> None: ...

class CostStatus(_message.Message):
    __slots__ = ("fork", "prefill_run", "prefill_token", "decode_token", "slow_decode_token", "image_token", "predictions", "median_error", "high_error", "slow_refusal")
    FORK_FIELD_NUMBER: _ClassVar[int]
    PREFILL_RUN_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKEN_FIELD_NUMBER: _ClassVar[int]
    DECODE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SLOW_DECODE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    IMAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    MEDIAN_ERROR_FIELD_NUMBER: _ClassVar[int]
    HIGH_ERROR_FIELD_NUMBER: _ClassVar[int]
    SLOW_REFUSAL_FIELD_NUMBER: _ClassVar[int]
    fork: _duration_pb2.Duration
    prefill_run: _duration_pb2.Duration
    prefill_token: _duration_pb2.Duration
    decode_token: _duration_pb2.Duration
    slow_decode_token: _duration_pb2.Duration
    image_token: _duration_pb2.Duration
    predictions: int
    median_error: float
    high_error: float
    slow_refusal: _duration_pb2.Duration
    def __init__(self, fork: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., prefill_run: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., prefill_token: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., decode_token: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., slow_decode_token: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., image_token: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., predictions: _Optional[int] = ..., median_error: _Optional[float] = ..., high_error: _Optional[float] = ..., slow_refusal: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class CameraStatus(_message.Message):
    __slots__ = ("camera", "newest_frame_time", "frames", "replaced_frames", "refused_frames")
    CAMERA_FIELD_NUMBER: _ClassVar[int]
    NEWEST_FRAME_TIME_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    REPLACED_FRAMES_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FRAMES_FIELD_NUMBER: _ClassVar[int]
    camera: str
    newest_frame_time: _timestamp_pb2.Timestamp
    frames: int
    replaced_frames: int
    refused_frames: int
    def __init__(self, camera: _Optional[str] = ..., newest_frame_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., frames: _Optional[int] = ..., replaced_frames: _Optional[int] = ..., refused_frames: _Optional[int] = ...) -> None: ...

class AnswerSummary(_message.Message):
    __slots__ = ("request_id", "outcome", "budget", "usage", "timings", "predicted")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    outcome: str
    budget: _duration_pb2.Duration
    usage: Usage
    timings: Timings
    predicted: _duration_pb2.Duration
    def __init__(self, request_id: _Optional[str] = ..., outcome: _Optional[str] = ..., budget: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., predicted: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ContextStatus(_message.Message):
    __slots__ = ("tokens", "window_tokens", "oldest_event_time", "newest_event_time")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OLDEST_EVENT_TIME_FIELD_NUMBER: _ClassVar[int]
    NEWEST_EVENT_TIME_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    window_tokens: int
    oldest_event_time: _timestamp_pb2.Timestamp
    newest_event_time: _timestamp_pb2.Timestamp
    def __init__(self, tokens: _Optional[int] = ..., window_tokens: _Optional[int] = ..., oldest_event_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., newest_event_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class MqttStatus(_message.Message):
    __slots__ = ("connected", "broker", "protocol", "reconnects", "counters")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    BROKER_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    RECONNECTS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    connected: bool
    broker: str
    protocol: str
    reconnects: int
    counters: _containers.ScalarMap[str, int]
    def __init__(self, connected: bool = ..., broker: _Optional[str] = ..., protocol: _Optional[str] = ..., reconnects: _Optional[int] = ..., counters: _Optional[_Mapping[str, int]] = ...) -> None: ...
