"""The coarse head: logits from a part of the dimensions, which tell what exact ones are worth having.

It is used only where it holds what it should on hidden states that were held back. `iotd.model.head` makes logits of it
and of the exact head; which directions count is said in `convert.directions`.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from iotd.convert.directions import Directions
from iotd.convert.graph import GraphWriter
from iotd.convert.judge import Reference, Tally, tally
from iotd.convert.rounding import Rounding
from iotd.convert.weights import Matrix
from iotd.model.head import Coarse, Graph, Rows
from iotd.model.package import COARSE_HEAD, CoarseEntry
from iotd.model.session import OpenGraph

Floats = NDArray[np.float32]
NAME = "coarse"
RANK_PARTS = (8, 4, 8 / 3)
"""The hidden size is so many times as large as the ranks that are tried."""
CANDIDATES = (256, 512, 1024)
DEVIATIONS = 4.0
CANDIDATE_NBYTES = 16_000
"""What a candidate takes, in bytes of a matrix that is read in the same time: 1 µs here, at 16 GB/s."""
OVERHEAD_NBYTES = 4_000_000
"""What the second stage takes besides."""
LEAST_STATES = 1000
"""With fewer to judge by, nothing is known of what happens once in 2,000 times."""
MEASURED_RANK_PART, MEASURED_CANDIDATES, MEASURED_STATES = 4, 512, 32
"""Of a head that is kept to measure what it takes: what real ones have, and enough to see that it is not right."""


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """What the head will be given, as the quantised model makes it of texts."""

    fit: Floats
    """float32 [n, D]: what the coarse head is made of."""
    held: Floats
    """float32 [m, D], of other texts: what it is judged by."""


@dataclass(frozen=True, slots=True)
class Exact:
    """The exact head as it was written."""

    graph: Graph
    rows: Rows
    matrix: Matrix
    """Its rows as they are read back, [V, D]."""
    nbytes: int
    """What one run of it reads."""


def write_coarse(
    folder: Path, exact: Exact, rounding: Rounding, hidden: HiddenStates, open_graph: OpenGraph, *, keep: bool = False
) -> tuple[CoarseEntry | None, str]:
    """Write the cheapest coarse head that holds what it should, or say why there is none.

    keep: write one in any case, to measure what it takes.
    """
    choices = [] if keep else [*_choices(exact, rounding)]
    if not keep and not choices:
        return None, "the vocabulary is small: all logits take no longer"
    if not keep and len(hidden.held) < LEAST_STATES:
        return None, f"calibration held {len(hidden.held)} tokens back, and {LEAST_STATES} are needed to judge one"
    work = folder / "coarse"
    writer = _Writer(work, exact, rounding, Directions.of(exact.matrix, hidden.fit), open_graph)
    reference = Reference.of(exact.graph, hidden.held[:MEASURED_STATES] if keep else hidden.held)
    try:
        if keep:
            choice = _measured(exact, rounding)
            entry = _entry(choice, tally(*writer.opened(choice), reference, whole=True))
            writer.move(choice, folder)
            return entry, "the coarse head was made to be measured, not to be right"
        for choice in choices:
            found = tally(*writer.opened(choice), reference)
            if not found.failures(len(hidden.held)):
                writer.move(choice, folder)
                return _entry(choice, found), ""
        return None, "no coarse head that takes less time finds the likeliest tokens often enough"
    finally:
        shutil.rmtree(work, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Choice:
    rank: int
    candidates: int

    def nbytes(self, exact: Exact) -> float:
        """What a token reads, or could have read in the time."""
        coarse = exact.nbytes * self.rank / exact.matrix.columns
        return coarse + self.candidates * CANDIDATE_NBYTES + OVERHEAD_NBYTES


def _choices(exact: Exact, rounding: Rounding) -> Iterator[_Choice]:
    """Those that take less than all logits, the cheapest first."""
    ranks = sorted({_rank(exact, rounding, part) for part in RANK_PARTS})
    found = [_Choice(rank, n) for rank in ranks for n in CANDIDATES if n < exact.matrix.rows]
    for choice in sorted(found, key=lambda choice: choice.nbytes(exact)):
        if choice.nbytes(exact) < exact.nbytes:
            yield choice


def _measured(exact: Exact, rounding: Rounding) -> _Choice:
    return _Choice(_rank(exact, rounding, MEASURED_RANK_PART), min(MEASURED_CANDIDATES, -(-exact.matrix.rows // 4)))


def _rank(exact: Exact, rounding: Rounding, part: float) -> int:
    """In whole blocks: what is missing to one is read all the same."""
    block = rounding.grid(NAME).block
    return min(exact.matrix.columns, -(-round(exact.matrix.columns / part) // block) * block)


def _entry(choice: _Choice, found: Tally) -> CoarseEntry:
    return CoarseEntry(
        rank=choice.rank,
        candidates=choice.candidates,
        deviations=DEVIATIONS,
        n_states=found.n_states,
        fallback=found.fallback,
        argmax=found.argmax,
        top20=found.top,
        kl=found.kl,
    )


class _Writer:
    """Writes coarse heads, each into a folder of its own, and opens them."""

    def __init__(
        self, work: Path, exact: Exact, rounding: Rounding, directions: Directions, open_graph: OpenGraph
    ) -> None:
        self._work = work
        self._exact = exact
        self._rounding = rounding
        self._directions = directions
        self._open_graph = open_graph
        self._graphs: dict[int, Graph] = {}

    def opened(self, choice: _Choice) -> tuple[Coarse, Graph]:
        matrix = self._exact.matrix
        if choice.rank not in self._graphs:
            self._write(choice.rank)
            path = self._folder(choice.rank) / COARSE_HEAD
            self._graphs[choice.rank] = Graph(path, matrix.rows, matrix.columns, self._open_graph)
        graph = self._graphs[choice.rank]
        return Coarse(graph, self._exact.rows.logits, choice.candidates, DEVIATIONS), graph

    def move(self, choice: _Choice, folder: Path) -> None:
        for path in self._folder(choice.rank).iterdir():
            path.rename(folder / path.name)

    def _write(self, rank: int) -> None:
        matrix, directions = self._exact.matrix, self._directions
        self._folder(rank).mkdir(parents=True)
        with GraphWriter(self._folder(rank) / COARSE_HEAD, self._rounding) as graph:
            graph.output("logits", TensorProto.FLOAT, ("R", matrix.rows))
            hidden = graph.input("hidden", TensorProto.FLOAT, ("R", matrix.columns))
            kept = np.ascontiguousarray(directions.hidden[:, :rank])
            projected = graph.op("MatMul", hidden, graph.constant("directions", kept))
            graph.linear(projected, NAME, directions.projected(matrix, rank), out="logits")

    def _folder(self, rank: int) -> Path:
        return self._work / str(rank)
