"""What a package costs on this machine: load time, prefill and decode speed, image encoding, memory.

Figures are medians of repeated runs in one process, with the smallest and largest beside them. Knows no daemon.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from iotd.model import Model, State
from iotd.ops import board

PREFILL_TOKENS = (32, 512)
DECODE_STEPS = 64
DECODE_CONTEXT = 512
IMAGE_SIDE = 256
CAPACITY = 2048


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing measured."""

    name: str
    unit: str
    median: float
    lowest: float
    highest: float


def machine() -> str:
    """The processor and its cores, for the line above a table."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {board.cores()} cores"
    return f"{platform.machine()}, {board.cores()} cores"


def run(package: Path, *, threads: int, repeat: int) -> Iterator[Figure]:
    """Measure a package, figure by figure. Raises PackageError where it cannot be opened."""
    began_s = time.perf_counter()
    model = Model.open(package, threads=threads)
    state = model.new_state(CAPACITY)
    model.prefill(state, [0])
    loaded_s = time.perf_counter() - began_s
    yield Figure("load", "s", loaded_s, loaded_s, loaded_s)
    for n_tokens in PREFILL_TOKENS:
        yield _figure(f"prefill {n_tokens}", "tokens/s", [_prefill(model, state, n_tokens) for _ in range(repeat)])
    decoded = [_decode(model, state) for _ in range(repeat)]
    yield _figure(f"decode at {DECODE_CONTEXT}", "tokens/s", decoded)
    yield from _memory("text")
    if model.has_vision:
        rgb = np.random.default_rng(0).integers(0, 256, (IMAGE_SIDE, IMAGE_SIDE, 3), np.uint8)
        model.encode_image(rgb)
        encoded = [_seconds(lambda: model.encode_image(rgb)) for _ in range(repeat)]
        yield _figure(f"image {IMAGE_SIDE} × {IMAGE_SIDE}", "s", encoded)
        yield from _memory("text and vision")


def _prefill(model: Model, state: State, n_tokens: int) -> float:
    state.reset()
    ids = _ids(model, n_tokens)
    return n_tokens / _seconds(lambda: model.prefill(state, ids))


def _decode(model: Model, state: State) -> float:
    state.reset()
    ids = _ids(model, DECODE_CONTEXT)
    model.prefill(state, ids)

    def steps() -> None:
        for token in ids[:DECODE_STEPS]:
            model.step(state, token)

    return DECODE_STEPS / _seconds(steps)


def _memory(what: str) -> Iterator[Figure]:
    for name, nbytes in (("resident", board.resident_nbytes()), ("anonymous", board.anonymous_nbytes())):
        megabytes = nbytes / 1e6
        yield Figure(f"{name}, {what}", "MB", megabytes, megabytes, megabytes)


def _figure(name: str, unit: str, values: list[float]) -> Figure:
    return Figure(name, unit, statistics.median(values), min(values), max(values))


def _seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def _ids(model: Model, n_tokens: int) -> list[int]:
    """Tokens that jump through the vocabulary, so that embedding rows are not all in one page."""
    found: list[int] = np.random.default_rng(n_tokens).integers(0, model.spec.vocab_size, n_tokens).tolist()
    return found
