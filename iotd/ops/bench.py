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
from numpy.typing import NDArray

from iotd.model import Model, State
from iotd.ops import board
from iotd.ops.peers import LlamaServer, Speeds

PREFILL_TOKENS = (16, 32, 128, 512, 2048)
DECODE_STEPS = 48
DECODE_CONTEXTS = (32, 512, 2000)
PEER_TOKENS = 512
"""Read, and decoded after, where a peer does the same in turn."""
IMAGE_SIDES = (160, 256, 384)
MOST_DECODES = 20
"""One after the other, each with its steps: more repeats begin the context anew."""
CAPACITY = max(*PREFILL_TOKENS, *DECODE_CONTEXTS) + MOST_DECODES * DECODE_STEPS


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


def run(package: Path, *, threads: int, repeat: int, peer: LlamaServer | None = None) -> Iterator[Figure]:
    """Measure a package, figure by figure. peer: does the same in turn.

    Raises PackageError where the package cannot be opened, Unavailable where the peer does not answer.
    """
    Model.open(package, threads=threads)  # the first start on a machine packs the weights
    board.give_back_memory()
    began_s = time.perf_counter()
    model = Model.open(package, threads=threads)
    state = model.new_state(CAPACITY)
    model.prefill(state, [0])
    loaded_s = time.perf_counter() - began_s
    board.give_back_memory()  # as the daemon does
    yield Figure("load", "s", loaded_s, loaded_s, loaded_s)
    for n_tokens in PREFILL_TOKENS:
        yield figure(f"prefill {n_tokens}", "tokens/s", [_prefill(model, state, n_tokens) for _ in range(repeat)])
    for context in DECODE_CONTEXTS:
        yield figure(f"decode at {context}", "tokens/s", _decode(model, state, context, repeat))
    yield from _memory("text")
    if peer is not None:
        yield from _against(peer, model, state, repeat)
    if model.has_vision:
        for side in IMAGE_SIDES:
            yield figure(f"image {side} × {side}", "s", _encode(model, side, repeat))
        yield from _memory("text and vision")


def _against(peer: LlamaServer, model: Model, state: State, repeat: int) -> Iterator[Figure]:
    """Both read and decode the same tokens, one after the other; how many times faster the package is."""
    ids = token_ids(model, PEER_TOKENS)
    peer.speeds(ids.tolist(), DECODE_STEPS)
    ours: list[tuple[float, float]] = []
    theirs: list[Speeds] = []
    for _ in range(repeat):
        (decoded,) = _decode(model, state, PEER_TOKENS, 1)
        ours.append((_prefill(model, state, len(ids)), decoded))
        theirs.append(peer.speeds(ids.tolist(), DECODE_STEPS))
    for name, own, other in (
        (f"prefill {len(ids)}", [prefill for prefill, _ in ours], [speeds.prefill for speeds in theirs]),
        (f"decode at {len(ids)}", [decode for _, decode in ours], [speeds.decode for speeds in theirs]),
    ):
        yield figure(f"{name}, in turn", "tokens/s", own)
        yield figure(f"{name}, llama.cpp", "tokens/s", other)
        yield figure(f"{name}, ratio", "×", [a / b for a, b in zip(own, other, strict=True)])


def _prefill(model: Model, state: State, n_tokens: int) -> float:
    state.reset()
    ids = token_ids(model, n_tokens)
    return n_tokens / _seconds(lambda: model.prefill(state, ids))


def _decode(model: Model, state: State, context: int, repeat: int) -> list[float]:
    ids = token_ids(model, context).tolist()
    steps = token_ids(model, DECODE_STEPS).tolist()

    def decode() -> None:
        for token in steps:
            model.step(state, token)

    found = []
    for n in range(repeat):
        if n % MOST_DECODES == 0:
            state.reset()
            model.prefill(state, ids, logits=False)
        found.append(DECODE_STEPS / _seconds(decode))
    return found


def _encode(model: Model, side: int, repeat: int) -> list[float]:
    rgb = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    model.encode_image(rgb)
    return [_seconds(lambda: model.encode_image(rgb)) for _ in range(repeat)]


def _memory(what: str) -> Iterator[Figure]:
    for name, nbytes in (("resident", board.resident_nbytes()), ("anonymous", board.anonymous_nbytes())):
        megabytes = nbytes / 1e6
        yield Figure(f"{name}, {what}", "MB", megabytes, megabytes, megabytes)


def figure(name: str, unit: str, values: list[float]) -> Figure:
    """The median of what was measured, and its spread."""
    return Figure(name, unit, statistics.median(values), min(values), max(values))


def _seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def token_ids(model: Model, n_tokens: int) -> NDArray[np.int64]:
    """int64 [n_tokens] that jump through the vocabulary, so that embedding rows are not all in one page."""
    return np.random.default_rng(n_tokens).integers(0, model.spec.vocab_size, n_tokens)
