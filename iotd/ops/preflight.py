"""What `iotd check` looks at before the daemon starts, each as a finding with its remedy. Changes and starts nothing.

What the daemon itself would do with the model, the address and the broker is handed in.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from iotd.config import Config, GrpcConfig, MqttConfig
from iotd.engine import Engine
from iotd.engine.context import positions
from iotd.errors import ConfigError, IotdError, PackageError
from iotd.model import package
from iotd.model.head import head_in_use
from iotd.model.spec import ModelSpec
from iotd.ops import board

Open = Callable[[Config], Engine]
"""Opens the model and allocates what the daemon would; raises PackageError or ConfigError."""
Listen = Callable[[GrpcConfig], None]
"""Raises ConfigError where the address or the TLS files cannot be used."""
Try = Callable[[MqttConfig], str]
"""Connects to the broker and leaves again; returns what it saw, raises OSError or IotdError."""

SPARE_NBYTES = 64 << 20
"""Left free for the rest of the board when memory is judged."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `remedy` says what to do and is empty where all is well."""

    name: str
    ok: bool
    text: str
    remedy: str = ""


def inspect(config: Config, threads: int, *, model: Open, listen: Listen, broker: Try) -> Iterator[Finding]:
    """Look at the model, the memory, the address, the snapshot's place and the broker, in this order."""
    yield from _model(config, threads, model)
    yield _grpc(config.grpc, listen)
    if config.snapshot.path:
        yield _snapshot(Path(config.snapshot.path))
    if config.mqtt.host:
        yield _broker(config.mqtt, broker)
    else:
        yield Finding("broker", True, "none configured: readings and frames come from nowhere")


def check_positions(config: Config, spec: ModelSpec) -> None:
    """Raises ConfigError where window and reserve need more positions than the model has."""
    window, reserve = config.context.window, config.ask.reserve_tokens
    needed = positions(window, reserve)
    if needed > spec.max_positions:
        raise ConfigError(
            f"window {window} and ask.reserve_tokens {reserve} need {needed} positions together, with "
            f"{needed - window - reserve} to spare, and the model has {spec.max_positions}",
            field="context.window",
        )


def check_head(config: Config, manifest: package.Manifest) -> None:
    """Raises ConfigError where the package lacks the configured head."""
    try:
        head_in_use(manifest.head, config.model.head)
    except PackageError as e:
        raise ConfigError(str(e), field="model.head") from e


def _model(config: Config, threads: int, open_model: Open) -> Iterator[Finding]:
    folder = Path(config.model.path)
    try:
        manifest = package.read_manifest(folder)
        package.verify(folder, manifest)
        check_positions(config, manifest.spec)
        check_head(config, manifest)
        weights = sum(entry.nbytes for entry in manifest.files.values())
        memory = _memory(config, manifest, weights)
        # Where it would take the memory that others need, it is not opened for a look.
        frames = [_frames(config, open_model(config))] if memory.ok else []
    except PackageError as e:
        yield Finding("model", False, str(e), "set model.path to a folder that `iotd convert` wrote")
        return
    except ConfigError as e:
        yield Finding("model", False, str(e), f"correct {e.field}")
        return
    vision = "text and images" if manifest.spec.vision else "text only"
    yield Finding(
        "model", True, f"{manifest.name} ({manifest.recipe.name}, {vision}), {_mb(weights)} on disk, {threads} threads"
    )
    yield _quality(manifest)
    yield _head(config, manifest)
    yield memory
    yield from (finding for finding in frames if finding is not None)


def _frames(config: Config, engine: Engine) -> Finding | None:
    """A window that no camera's frame fits into; with cameras to subscribe to, that is a problem."""
    labels = [each.label or each.topic for each in config.mqtt.subscriptions if each.kind == "image"]
    needed = max(map(engine.least_window, labels or ["door"]))
    if config.context.window >= needed:
        return None
    text = f"no camera's frame fits into the window of {config.context.window} tokens, not even at its smallest"
    return Finding("frames", not labels, text, f"set context.window to {needed} or more" if labels else "")


def _quality(manifest: package.Manifest) -> Finding:
    """No reason not to start: it answers, as well as it can."""
    if manifest.kld is None:
        known = (
            "not measured" if manifest.recipe.bits == 4 else f"not measured, {manifest.recipe.bits} bits are near it"
        )
        return Finding("quality", True, f"how near the package is to its original is {known}")
    figures = ", ".join(f"{one.kind} {one.kld_mean:.3f} nats ({one.top1:.0%} same)" for one in manifest.quality)
    return Finding("quality", True, f"{manifest.poor}: " * bool(manifest.poor) + f"from its original on {figures}")


def _head(config: Config, manifest: package.Manifest) -> Finding:
    kind, because = head_in_use(manifest.head, config.model.head)
    return Finding("head", True, f"{kind}: {because}")


def _memory(config: Config, manifest: package.Manifest, weights: int) -> Finding:
    """Two context states, one of the system prompt alone, and two without rows: the fork of the ask that runs, and one
    in which it looks ahead."""
    reserve = config.ask.reserve_tokens
    most = positions(config.context.window, reserve)
    capacities = (most, most, reserve, 0, 0)
    shapes = [shape for capacity in capacities for shape in manifest.spec.state_shapes(capacity).values()]
    states = 4 * sum(math.prod(shape) for shape in shapes)
    text = f"{len(capacities)} states of up to {most} positions take {_mb(states)}"
    text += f", with the weights {_mb(states + weights)}"
    available = board.available_nbytes()
    if available is not None and states + weights + SPARE_NBYTES > available:
        return Finding("memory", False, f"{text}; only {_mb(available)} are free", "set a smaller context.window")
    return Finding("memory", True, text)


def _grpc(grpc: GrpcConfig, listen: Listen) -> Finding:
    try:
        listen(grpc)
    except ConfigError as e:
        return Finding("grpc", False, str(e), "stop what uses the address, or correct the keys of grpc")
    tls = "mutual TLS" if grpc.tls_client_ca_file else "TLS" if grpc.tls_cert_file else "no TLS"
    return Finding("grpc", True, f"{grpc.listen} is free, {tls}")


def _snapshot(path: Path) -> Finding:
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        # No reason not to start: everything else works.
        text = f"the context is not saved, as this user cannot write to {folder}: snapshot.path may name another file"
        return Finding("snapshot", True, text)
    return Finding("snapshot", True, f"the context is saved to {path}")


def _broker(mqtt: MqttConfig, connect: Try) -> Finding:
    address = f"{mqtt.host}:{mqtt.port}"
    try:
        seen = connect(mqtt)
    except ConfigError as e:
        return Finding("broker", False, str(e), f"correct {e.field}")
    except (OSError, IotdError) as e:
        remedy = "check mqtt.host and mqtt.port, that the broker runs, and the credentials"
        return Finding("broker", False, f"{address} does not answer: {e}", remedy)
    topics = ", ".join(f"{s.topic} ({s.kind})" for s in mqtt.subscriptions) or "nothing: set mqtt.subscriptions"
    return Finding("broker", True, f"{address} answers ({seen}); subscribes {topics}")


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"
