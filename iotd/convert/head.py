"""From hidden states to logits: the exact head, and where it pays a coarse one beside it (`convert.coarse`)."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from iotd.convert.coarse import Exact, HiddenStates, write_coarse
from iotd.convert.graph import GraphWriter
from iotd.convert.rounding import HEAD as NAME
from iotd.convert.rounding import Rounding
from iotd.convert.weights import Matrix, Weights, slices
from iotd.model.head import Graph, Rows
from iotd.model.package import HEAD, HEAD_IDS, HeadEntry
from iotd.model.session import OpenGraph, Threads, open_session
from iotd.model.spec import ModelSpec
from iotd.model.table import RowTable

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def write_head(
    folder: Path,
    spec: ModelSpec,
    weights: Weights,
    rounding: Rounding,
    shortlist: Sequence[int] | None,
    hidden: HiddenStates | None = None,
    *,
    keep: bool = False,
) -> HeadEntry:
    """Write the exact head, and a coarse one where hidden states show that it holds what it should.

    Where the head is the embedding, too, its table has a row for each token all the same, those of the shortlist first.
    shortlist: the tokens that have a logit, ascending; None gives one to each. hidden: what the model gives for texts.
    keep: write a coarse head even where it is of no use, to measure what it takes.
    """
    matrix = head_matrix(spec, weights, shortlist)
    with GraphWriter(folder / HEAD, rounding) as graph:
        graph.output("logits", TensorProto.FLOAT, ("R", matrix.rows))
        states = graph.input("hidden", TensorProto.FLOAT, ("R", spec.hidden_size))
        table = graph.table(NAME, _with_others(matrix, spec, weights, shortlist), matrix.rows)
        graph.matmul(states, NAME, matrix.columns, matrix.rows, out="logits")
    if shortlist is not None:
        (folder / HEAD_IDS).write_bytes(np.asarray(shortlist, "<i4").tobytes())
    if hidden is None:
        return HeadEntry(
            rows=matrix.rows, table=table, exact_because="the checkpoint was converted without calibration"
        )
    open_graph = partial(open_session, threads=Threads.of_all_cores())
    exact = _written(folder, HeadEntry(rows=matrix.rows, table=table), matrix.columns, open_graph)
    coarse, because = write_coarse(folder, exact, rounding, hidden, open_graph, keep=keep)
    return HeadEntry(rows=matrix.rows, table=table, coarse=coarse, exact_because=because)


def _written(folder: Path, entry: HeadEntry, columns: int, open_graph: OpenGraph) -> Exact:
    """The exact head as it was just written."""
    graph = Graph(folder / HEAD, entry.rows, columns, open_graph)
    table = RowTable(folder, entry.table, entry.rows, columns)

    def read(start: int, stop: int) -> Floats:
        found = np.empty((stop - start, columns), np.float32)
        table.rows(np.arange(start, stop), found)
        return found

    nbytes = columns * entry.rows * entry.table.bits // 8
    return Exact(graph, Rows(table, entry, graph), Matrix(entry.rows, columns, read), nbytes)


def _with_others(matrix: Matrix, spec: ModelSpec, weights: Weights, shortlist: Sequence[int] | None) -> Matrix:
    """Behind the rows of the shortlist those of all other tokens, ascending, where a text may be made of them."""
    if shortlist is None or not spec.tied:
        return matrix
    others = head_matrix(spec, weights, np.setdiff1d(np.arange(spec.vocab_size), shortlist), again=True)
    n = matrix.rows

    def read(start: int, stop: int) -> Floats:
        parts = [matrix.read(start, min(stop, n))] if start < n else []
        if stop > n:
            parts.append(others.read(max(start - n, 0), stop - n))
        return np.concatenate(parts)

    return Matrix(n + others.rows, matrix.columns, read)


def head_matrix(
    spec: ModelSpec, weights: Weights, shortlist: Sequence[int] | Ints | None, *, again: bool = False
) -> Matrix:
    name = "text.embed_tokens.weight" if spec.tied else "head.weight"
    whole = weights.matrix(name, spec.vocab_size, spec.hidden_size, again=again)
    if shortlist is None:
        return whole
    ids = np.asarray(shortlist)

    def read(start: int, stop: int) -> Floats:
        wanted = ids[start:stop]
        parts = (wanted[(wanted >= first) & (wanted < end)] for first, end in slices(whole))
        return np.concatenate([whole.read(part[0], part[-1] + 1)[part - part[0]] for part in parts if len(part)])

    return Matrix(len(ids), whole.columns, read)
