"""What a package costs on this machine: load time, prefill and decode speed, image encoding, memory.

Figures are medians of repeated runs in one process, with the smallest and largest beside them. Knows no daemon.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from iotd.model import Model, State
from iotd.model.head import HeadChoice
from iotd.ops import board, energy
from iotd.ops.peers import Peer, Speeds

PREFILL_TOKENS = (16, 32, 128, 512, 2048)
DECODE_STEPS = 48
DECODE_CONTEXTS = (32, 512, 2000)
IN_TURN_TOKENS = 512
"""Read, and decoded after, where peers do the same in turn, and where energy is measured."""
PEER_CAPACITY = IN_TURN_TOKENS + DECODE_STEPS + 16
QUIET_S = 0.2
"""Before each turn: onnxruntime's threads may spin for 50 ms after a run, and those of a peer are its own affair."""
IMAGE_SIDES = (160, 256, 384)
MOST_DECODES = 20
"""One after the other, each with its steps: more repeats begin the context anew."""
CAPACITY = max(*PREFILL_TOKENS, *DECODE_CONTEXTS) + MOST_DECODES * DECODE_STEPS
OURS = "iotd"

Ints = NDArray[np.int64]
T = TypeVar("T")
Measure = Callable[[Callable[[], object]], float]
"""What work costs: seconds, or joules."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing measured."""

    name: str
    unit: str
    median: float
    lowest: float
    highest: float
    engine: str = OURS
    """Whose it is."""
    chart: str = ""
    """Where it is plotted: with those of the same name. Empty: nowhere."""
    at: int = 0
    """Its place there, in the chart's own unit; 0 where the engines stand beside each other."""


def machine() -> str:
    """The processor and its cores, for the line above a table."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {board.cores()} cores"
    return f"{platform.machine()}, {board.cores()} cores"


def _seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def run(
    package: Path, *, threads: int, repeat: int, head: HeadChoice = "exact", peers: Sequence[Peer] = ()
) -> Iterator[Figure]:
    """Measure a package, figure by figure. head: see `Model.open`. peers: do the same in turn.

    Raises PackageError where the package cannot be opened, Unavailable where a peer does not answer.
    """
    Model.open(package, threads=threads, head=head)  # the first start on a machine packs the weights
    board.give_back_memory()
    began_s = time.perf_counter()
    model = Model.open(package, threads=threads, head=head)
    state = model.new_state(CAPACITY)
    model.prefill(state, [0])
    loaded_s = time.perf_counter() - began_s
    board.give_back_memory()  # as the daemon does
    yield figure("load", "s", [loaded_s])
    for n in PREFILL_TOKENS:
        speeds = [1 / s for s in _prefill(model, state, token_ids(model, n), repeat)]
        yield figure(f"prefill {n}", "tokens/s", speeds, chart="prefill", at=n)
    for n in DECODE_CONTEXTS:
        speeds = [1 / s for s in _decode(model, state, token_ids(model, n), repeat)]
        yield figure(f"decode at {n}", "tokens/s", speeds, chart="decode", at=n)
    yield from _memory("text", OURS, os.getpid())
    ids = token_ids(model, IN_TURN_TOKENS)
    if meter := energy.meter():
        for name, cost in ((f"prefill {len(ids)}", _prefill), (f"decode at {len(ids)}", _decode)):
            yield figure(f"{name}, {meter.name}", "J/token", cost(model, state, ids, repeat, meter.joules))
    if peers:
        yield from _against(Ours(model, state), peers, ids.tolist(), repeat)
    if model.has_vision:
        for side in IMAGE_SIDES:
            yield figure(f"image {side} × {side}", "s", _encode(model, side, repeat), chart="image encoding", at=side)
        yield from _memory("text and vision", OURS, os.getpid(), plotted=False)


class Ours:
    """The package as a peer of the others."""

    name, pid = OURS, os.getpid()

    def __init__(self, model: Model, state: State) -> None:
        self._model = model
        self._state = state

    def speeds(self, ids: Sequence[int], n_predict: int) -> Speeds:
        (prefill_s,) = _prefill(self._model, self._state, np.array(ids), 1)
        decode_s = _seconds(lambda: _write(self._model, self._state, n_predict))
        return Speeds(1 / prefill_s, n_predict / decode_s)


def in_turn(works: Mapping[str, Callable[[], T]], repeat: int) -> dict[str, list[T]]:
    """What each gave, so many times, one after the other in each turn; a turn before them warms."""
    turns = [{name: work() for name, work in works.items()} for _ in range(1 + repeat)][1:]
    return {name: [turn[name] for turn in turns] for name in works}


def _against(ours: Peer, peers: Sequence[Peer], ids: list[int], repeat: int) -> Iterator[Figure]:
    """All read and decode as many tokens, one after the other; how many times faster the package is in each turn."""

    def measured(engine: Peer) -> Speeds:
        time.sleep(QUIET_S)
        return engine.speeds(ids, DECODE_STEPS)

    found = in_turn({engine.name: partial(measured, engine) for engine in (ours, *peers)}, repeat)
    for what, name in (("prefill", f"prefill {len(ids)}"), ("decode", f"decode at {len(ids)}")):
        speeds = {engine: [getattr(each, what) for each in own] for engine, own in found.items()}
        for engine, values in speeds.items():
            yield figure(f"{name}, {engine}", "tokens/s", values, engine=engine, chart=f"{name}, in turn")
        for peer in peers:
            ratios = [a / b for a, b in zip(speeds[ours.name], speeds[peer.name], strict=True)]
            yield figure(f"{name}, ratio to {peer.name}", "×", ratios)
    for peer in peers:
        if pid := peer.pid:
            yield from _memory(peer.name, peer.name, pid)


def _prefill(model: Model, state: State, ids: Ints, repeat: int, measure: Measure = _seconds) -> list[float]:
    """What each token costs."""
    found = []
    for _ in range(repeat):
        state.reset()
        found.append(measure(lambda: model.prefill(state, ids)) / len(ids))
    return found


def _decode(model: Model, state: State, ids: Ints, repeat: int, measure: Measure = _seconds) -> list[float]:
    """What each token after a context costs."""
    found = []
    for n in range(repeat):
        if n % MOST_DECODES == 0:
            state.reset()
            model.prefill(state, ids, logits=False)
        found.append(measure(lambda: _write(model, state, DECODE_STEPS)) / DECODE_STEPS)
    return found


def _write(model: Model, state: State, n_tokens: int) -> None:
    """Greedily, as peers do."""
    token = 0
    for _ in range(n_tokens):
        token = int(model.step(state, token).argmax())


def _encode(model: Model, side: int, repeat: int) -> list[float]:
    rgb = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    model.encode_image(rgb)
    return [_seconds(lambda: model.encode_image(rgb)) for _ in range(repeat)]


def _memory(what: str, engine: str, pid: int, *, plotted: bool = True) -> Iterator[Figure]:
    for name, nbytes in (("resident", board.resident_nbytes(pid)), ("anonymous", board.anonymous_nbytes(pid))):
        chart = f"{name} memory" if plotted else ""
        yield figure(f"{name}, {what}", "MB", [nbytes / 1e6], engine=engine, chart=chart)


def figure(name: str, unit: str, values: list[float], *, engine: str = OURS, chart: str = "", at: int = 0) -> Figure:
    """The median of what was measured, and its spread."""
    return Figure(name, unit, statistics.median(values), min(values), max(values), engine, chart, at)


def token_ids(model: Model, n_tokens: int) -> Ints:
    """int64 [n_tokens] that jump through the vocabulary, so that embedding rows are not all in one page."""
    return np.random.default_rng(n_tokens).integers(0, model.spec.vocab_size, n_tokens)
