"""The configuration: YAML to typed, frozen settings. Every error names the field's path.

Knows no other part of iotd but its errors; each part is handed its own section.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import yaml

from iotd.address import is_loopback, split_address
from iotd.errors import ConfigError
from iotd.topics import TopicFilter, is_topic_filter

ENV_PREFIX = "IOTD_"

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Bytes = Annotated[int, msgspec.Meta(ge=1024, le=1 << 30)]
Budget = Annotated[float, msgspec.Meta(gt=0, le=86_400)]

DEFAULT_SYSTEM = (
    "You watch a home through its sensors and cameras. Each line of the user's turn is one reading with its time. "
    "Answer the question at the end from the newest readings, briefly and exactly."
)


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A mapping of the file with exactly these keys."""


class ModelConfig(_Section, frozen=True):
    path: str = "/var/lib/iotd/model"
    """Folder of the model package that `iotd convert` wrote."""
    threads: Annotated[int, msgspec.Meta(ge=0, le=256)] = 0
    """Compute threads; 0 takes all cores but one, at least 1 and at most 4. `iotd bench tune` measures which are best,
    with the two below."""
    spinning: bool = True
    """They wait for work in a loop while the model runs: faster, unless something else needs their cores meanwhile."""
    affinity: bool = False
    """All but one of them keep to a core each, the last ones."""
    head: Literal["auto", "exact", "two-stage"] = "auto"
    """How the next word is found in the vocabulary: from the logits of all tokens, or of those alone that a coarse pass
    finds likely. That reads a fifth less for each token, and takes all where it cannot be sure of the likeliest; of a
    draw from the whole vocabulary (top_k 0) it leaves out what is far from likely. `auto` does so where the package's
    conversion found that it is right."""
    max_image_pixels: Annotated[int, msgspec.Meta(ge=1024)] = 65_536
    """Images are resized to this many at most before they are encoded; the 0.8B makes 64 tokens of 65,536."""


class ContextConfig(_Section, frozen=True):
    window: Annotated[int, msgspec.Meta(ge=128, le=1_000_000)] = 2048
    """Tokens of history the context holds at most; it keeps at least half of them."""
    system: str = DEFAULT_SYSTEM
    chunk_tokens: Count = 32
    """Tokens of the stream read at once, at most; lines that wait together are gathered up to it."""
    chunk_s: Annotated[float, msgspec.Meta(gt=0, le=60)] = 0.05
    """How long one such run may take, as an ask waits for it. Fewer tokens are read at once where it takes more."""
    backlog: Count = 256
    """Readings waiting to be read; the oldest is dropped, and counted, when one more arrives."""


class AskConfig(_Section, frozen=True):
    queue: Count = 32
    """Asks waiting; one more is refused with RESOURCE_EXHAUSTED, as is one that does not fit between them."""
    budget_s: Budget = 30.0
    """Budget of an ask that brings none."""
    max_budget_s: Budget = 600.0
    max_tokens: Count = 256
    """Answer tokens of an ask that names no number."""
    temperature: Annotated[float, msgspec.Meta(ge=0, le=10)] = 0.7
    """Of an ask that names none."""
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0
    """Of an ask that names none. Names and units come again by nature, and loops are noticed without it."""
    reserve_tokens: Annotated[int, msgspec.Meta(ge=64, le=1_000_000)] = 1024
    """Positions kept beyond the window for a question with its images and answer."""
    session_bytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)] = 256 * 1024 * 1024
    """Memory of all conversations that are kept, each of which takes a whole state; the one unused for longest makes
    way. 0 keeps none."""
    max_images: Annotated[int, msgspec.Meta(ge=0, le=64)] = 4
    tell_length: bool = True
    """Tell the model how many words there is time for, where these are few: a line behind the question. For models that
    heed it."""
    drafting: bool = False
    """Guess at the words of an answer from the readings it may quote, and read several at once where the guess is
    right: twice as fast for long quotations on the 0.8B, of no use for short answers. Takes one more recurrent state
    (20 MB with the 0.8B)."""


class SubscriptionConfig(_Section, frozen=True):
    topic: str
    """MQTT topic filter; `+`, `#` and `$share/<group>/` as the standard has them."""
    kind: Literal["text", "json", "image"] = "text"
    label: str = ""
    """Name in the context. `{0}`, `{1}`, … stand for the topic's levels; empty takes the levels that the filter's
    wildcards matched, or the whole topic."""
    unit: str = ""
    """Put behind a text value, or behind a JSON payload that is one number."""
    fields: dict[str, str] = {}
    """For `json`: dotted path of each field to take, with its unit (may be empty). Empty: every scalar at the top."""
    min_interval_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 0.0
    """Readings of one topic that follow sooner are dropped and counted."""


class MqttConfig(_Section, frozen=True):
    host: str = ""
    """Broker's host name; empty leaves MQTT off."""
    port: Port = 1883
    node: str = "iotd"
    """Topics begin with `iotd/<node>`."""
    asks: bool = True
    """Answer questions on `iotd/<node>/ask`, of everyone who may publish there."""
    client_id: str = ""
    username: str = ""
    password_file: str = ""
    tls: bool = False
    ca_file: str = ""
    keepalive_s: Annotated[int, msgspec.Meta(ge=5, le=65535)] = 30
    max_payload_bytes: Bytes = 8 * 1024 * 1024
    max_pixels: Annotated[int, msgspec.Meta(ge=1024, le=100_000_000)] = 8_000_000
    """Images with more are refused before they are decoded, those that come over gRPC too."""
    queue: Count = 256
    """Messages waiting to be parsed; the oldest is dropped, and counted, when one more arrives."""
    subscriptions: list[SubscriptionConfig] = []


class GrpcConfig(_Section, frozen=True):
    listen: str = "127.0.0.1:50551"
    """`host:port`; port 0 takes a free one. Loopback unless TLS is set up or `insecure` is true."""
    insecure: bool = False
    tls_cert_file: str = ""
    tls_key_file: str = ""
    tls_client_ca_file: str = ""
    """With it, clients must show a certificate of this authority (mutual TLS)."""
    reflection: bool = True
    max_message_bytes: Bytes = 16 * 1024 * 1024


class MetricsConfig(_Section, frozen=True):
    listen: str = ""
    """`host:port` of Prometheus metrics over plain HTTP, at /metrics; empty serves none. Port 0 takes a free one."""
    insecure: bool = False
    """Allows an address other than loopback."""


class SnapshotConfig(_Section, frozen=True):
    path: str = "/var/lib/iotd/context.snapshot"
    """File the context is saved to, so that a restart is warm; empty saves nothing."""
    interval_s: Annotated[float, msgspec.Meta(ge=10, le=86_400)] = 900.0
    """Saved at most so often while running, besides on a stop and on SIGUSR1: up to 95 MB each time, and cards wear."""


class LogConfig(_Section, frozen=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["plain", "json"] = "plain"


class Config(_Section, frozen=True):
    """Everything `iotd serve` can be told; every key is optional."""

    model: ModelConfig = ModelConfig()
    context: ContextConfig = ContextConfig()
    ask: AskConfig = AskConfig()
    mqtt: MqttConfig = MqttConfig()
    grpc: GrpcConfig = GrpcConfig()
    metrics: MetricsConfig = MetricsConfig()
    snapshot: SnapshotConfig = SnapshotConfig()
    log: LogConfig = LogConfig()


def load(path: Path | str | None, env: Mapping[str, str]) -> Config:
    """Read the file (None: no file, all defaults), apply `IOTD_<SECTION>__<KEY>` from `env`, and check everything.

    Raises ConfigError; its message has one line for each thing that is wrong, and `field` is the path of the first.
    """
    source = _read(Path(path)) if path is not None else _Source("", None, {})
    data, origins = _overridden(source.data, env)
    problems = list(_mismatches(Config, data, ""))
    if not problems:
        config = msgspec.convert(data, Config)
        problems = list(_contradictions(config))
        if not problems:
            return config
    lines = [f"{at or 'configuration'}: {text}{source.place(at, origins)}" for at, text in problems]
    raise ConfigError("\n".join(lines), field=problems[0][0])


Problem = tuple[str, str]
"""A path, and what is wrong there."""


@dataclass(frozen=True)
class _Source:
    """A parsed file: its plain data, and the nodes that tell each key's line."""

    name: str
    root: yaml.Node | None
    data: dict[str, Any]

    def place(self, path: str, origins: Mapping[str, str]) -> str:
        for key, variable in origins.items():
            # A section that only the environment names is itself at fault.
            if path == key or path.startswith((f"{key}.", f"{key}[")) or key.startswith(f"{path}."):
                return f" (from {variable})"
        if self.root is None:
            return ""
        return f" ({self.name}, line {_line(self.root, path)})"


class _Loader(yaml.SafeLoader):
    """The safe loader, which refuses a key that stands twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _read(path: Path) -> _Source:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"cannot read the configuration {path}: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not UTF-8 text: byte {e.start} cannot be read") from e
    root, data = _parsed(text, str(path))
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: the file must be a mapping of sections ({_keys(Config)}), not {_kind(data)}")
    return _Source(str(path), root, data)


def _parsed(text: str, name: str, field: str = "") -> tuple[yaml.Node | None, Any]:
    """The nodes and the plain data of a YAML text. Raises ConfigError, which begins with `name`."""
    try:
        return yaml.compose(text, Loader=_Loader), _without_empty(yaml.load(text, Loader=_Loader))
    except yaml.YAMLError as e:
        raise ConfigError(f"{name}{_mark(e)}", field=field) from e
    except RecursionError as e:
        raise ConfigError(f"{name} is nested too deeply, or an alias stands for what holds it", field=field) from e
    except (ValueError, LookupError, AttributeError, TypeError) as e:
        # What PyYAML's constructors raise for numbers, dates and tags whose value is none.
        raise ConfigError(f"{name} holds a value that is not what it looks like: {e}", field=field) from e


def _mark(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it is not YAML"
    return f", line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else f": {problem}"


def _line(root: yaml.Node, path: str) -> int:
    """The line, from 1, of the deepest node on `path` that the file has."""
    node, line = root, root.start_mark.line
    for part in re.findall(r"[^.\[\]]+", path):
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == part]
            if not found:
                break
            line, node = found[0][0].start_mark.line, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line
    return line + 1


def _overridden(data: dict[str, Any], env: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """`data` with the environment's values, and which variable each path came from."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    origins = {}
    for variable, text in sorted(env.items()):
        section, separator, key = variable.removeprefix(ENV_PREFIX).lower().partition("__")
        if not variable.startswith(ENV_PREFIX) or not separator:
            continue
        if not isinstance(merged.get(section), dict):
            merged[section] = {}
        merged[section][key] = _env_value(variable, section, key, text)
        origins[f"{section}.{key}"] = variable
    return _without_empty(merged), origins


def _env_value(variable: str, section: str, key: str, text: str) -> object:
    hints = get_type_hints(Config).get(section)
    if hints and get_type_hints(hints).get(key) is str:
        return text
    return _parsed(text, variable, f"{section}.{key}")[1]


def _without_empty(value: Any) -> Any:
    """A key without a value (all its children commented out) takes its default."""
    if isinstance(value, dict):
        return {key: _without_empty(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_empty(item) for item in value]
    return value


def _mismatches(kind: Any, value: Any, path: str) -> Iterator[Problem]:
    """Everything in `value` that is not of the annotated type `kind`."""
    origin = get_origin(kind)
    if isinstance(kind, type) and issubclass(kind, _Section):
        yield from _section_mismatches(kind, value, path)
    elif origin is list and isinstance(value, list):
        for i, item in enumerate(value):
            yield from _mismatches(get_args(kind)[0], item, f"{path}[{i}]")
    elif origin is dict and isinstance(value, dict):
        for key, item in value.items():
            yield from _mismatches(get_args(kind)[0], key, path)
            yield from _mismatches(get_args(kind)[1], item, f"{path}.{key}")
    elif not _fits(kind, value):
        yield path, f"{_shown(value)} is not allowed; use {_allowed(kind)}"


def _section_mismatches(kind: type[_Section], value: Any, path: str) -> Iterator[Problem]:
    if not isinstance(value, dict):
        yield path, f"{_shown(value)} is not allowed; use a mapping with the keys {_keys(kind)}"
        return
    hints = get_type_hints(kind, include_extras=True)
    for key, item in value.items():
        at = f"{path}.{key}" if path else str(key)
        if key in hints:
            yield from _mismatches(hints[key], item, at)
        else:
            yield at, _unknown(str(key), kind)
    for field in msgspec.structs.fields(kind):
        if field.required and field.name not in value:
            yield f"{path}.{field.name}", "is missing; it has no default"


def _fits(kind: Any, value: Any) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


def _unknown(key: str, kind: type[_Section]) -> str:
    known = list(get_type_hints(kind))
    if (beside := f"{key}_file") in known:
        return f"secrets are never written here; put it into a file and name that in {beside}"
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown key; {hint}Allowed here: {_keys(kind)}"


def _allowed(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) is Annotated:
        base, meta = get_args(kind)
        low = f"at least {meta.ge:,}" if meta.ge is not None else f"more than {meta.gt:,}"
        return f"{_allowed(base)}, {low} and at most {meta.le:,}"
    names: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text (in quotes)"}
    return names.get(kind) or ("a list" if get_origin(kind) is list else "a mapping")


def _keys(kind: type[_Section]) -> str:
    return ", ".join(get_type_hints(kind))


def _kind(value: object) -> str:
    return "a list" if isinstance(value, list) else type(value).__name__


def _shown(value: object) -> str:
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _contradictions(config: Config) -> Iterator[Problem]:
    """What is wrong between values that are each allowed."""
    if config.context.chunk_tokens > config.context.window // 4:
        most = config.context.window // 4
        yield "context.chunk_tokens", f"{config.context.chunk_tokens} is too large; use at most window / 4, here {most}"
    if config.ask.budget_s > config.ask.max_budget_s:
        yield "ask.budget_s", f"{config.ask.budget_s:g} is more than ask.max_budget_s, {config.ask.max_budget_s:g}"
    if config.ask.max_tokens > config.ask.reserve_tokens:
        yield "ask.max_tokens", f"{config.ask.max_tokens} is more than ask.reserve_tokens, {config.ask.reserve_tokens}"
    yield from grpc_contradictions(config.grpc)
    yield from _metrics_contradictions(config.metrics)
    yield from _mqtt_contradictions(config.mqtt)


def grpc_contradictions(grpc: GrpcConfig) -> Iterator[Problem]:
    """What is wrong with where the server would listen: half a TLS setup, no address, one open to others unasked."""
    if bool(grpc.tls_cert_file) != bool(grpc.tls_key_file):
        missing = "tls_key_file" if grpc.tls_cert_file else "tls_cert_file"
        yield f"grpc.{missing}", "is missing; TLS needs tls_cert_file and tls_key_file together"
    if grpc.tls_client_ca_file and not grpc.tls_cert_file:
        yield "grpc.tls_client_ca_file", "needs tls_cert_file and tls_key_file too"
    allowed = bool(grpc.tls_cert_file) or grpc.insecure
    yield from _address("grpc.listen", grpc.listen, allowed, "set tls_cert_file and tls_key_file, or insecure: true")


def _metrics_contradictions(metrics: MetricsConfig) -> Iterator[Problem]:
    if metrics.listen:
        yield from _address("metrics.listen", metrics.listen, metrics.insecure, "allow it with insecure: true")


def _address(at: str, listen: str, allowed: bool, remedy: str) -> Iterator[Problem]:
    """allowed: other machines may reach it."""
    try:
        host, _ = split_address(listen)
    except ValueError:
        yield at, f"{listen!r} is not allowed; use host:port, such as 127.0.0.1:50551 or [::1]:50551"
        return
    if not (is_loopback(host) or allowed):
        yield at, f"{listen!r} is open to other machines; {remedy}"


def _mqtt_contradictions(mqtt: MqttConfig) -> Iterator[Problem]:
    if re.search(r"[\s+#/]", mqtt.node) or not mqtt.node:
        yield "mqtt.node", f"{mqtt.node!r} is not allowed; use one topic level without spaces, +, # or /"
    if mqtt.password_file and not mqtt.username:
        yield "mqtt.username", "is missing; password_file needs it"
    if mqtt.ca_file and not mqtt.tls:
        yield "mqtt.tls", "is false; ca_file needs it true"
    yield from _subscription_contradictions(mqtt.subscriptions)


def _subscription_contradictions(subscriptions: list[SubscriptionConfig]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for i, subscription in enumerate(subscriptions):
        at = f"mqtt.subscriptions[{i}]"
        if not is_topic_filter(subscription.topic):
            yield f"{at}.topic", f"{subscription.topic!r} is not an MQTT topic filter: + fills a level, # only the last"
        elif (place := TopicFilter.parse(subscription.topic).missing(subscription.label)) is not None:
            yield f"{at}.label", f"{subscription.label!r} uses {place}, a level that no topic of this filter has"
        if (earlier := first.setdefault(subscription.topic, i)) != i:
            yield f"{at}.topic", f"{subscription.topic!r} stands in mqtt.subscriptions[{earlier}] already"
        if subscription.fields and subscription.kind != "json":
            yield f"{at}.fields", f"is for kind json, and this kind is {subscription.kind}"
