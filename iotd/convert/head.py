"""From hidden states to logits: the exact head, and a coarse one that tells which of its logits are worth having.

The coarse head projects hidden states and rows onto the directions in which the rows are longest (SVD-softmax, Shim et
al., 2017), a fraction of the exact one's bytes. `iotd.model.head` makes logits of both.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from iotd.convert.graph import GraphWriter
from iotd.convert.rounding import HEAD as NAME
from iotd.convert.rounding import Rounding
from iotd.convert.weights import Matrix, Weights, slices
from iotd.model.package import COARSE_HEAD, HEAD, HEAD_IDS, HeadEntry
from iotd.model.spec import ModelSpec

Floats = NDArray[np.float32]
SAMPLED_SLICES = 16
"""Of the rows, spread over the vocabulary, from which the directions are found."""
RANK_PART = 8
"""The coarse head has one dimension for so many of the hidden size."""
RANK_STEP = 32


def write_head(
    folder: Path, spec: ModelSpec, weights: Weights, rounding: Rounding, shortlist: Sequence[int] | None
) -> HeadEntry:
    """Write both heads. shortlist: the tokens that have a logit, ascending; None gives one to each."""
    matrix = head_matrix(spec, weights, shortlist)
    with GraphWriter(folder / HEAD, rounding) as graph:
        hidden = _declare(graph, spec, matrix.rows)
        table = graph.table(NAME, matrix)
        graph.matmul(hidden, NAME, matrix.columns, matrix.rows, out="logits")
    matrix = head_matrix(spec, weights, shortlist, again=True)
    directions = _directions(matrix)
    with GraphWriter(folder / COARSE_HEAD, rounding) as graph:
        hidden = _declare(graph, spec, matrix.rows)
        projected = graph.op("MatMul", hidden, graph.constant("directions", directions))
        graph.linear(projected, "coarse", _project(matrix, directions), out="logits")
    if shortlist is not None:
        (folder / HEAD_IDS).write_bytes(np.asarray(shortlist, "<i4").tobytes())
    return HeadEntry(rows=matrix.rows, table=table)


def _declare(graph: GraphWriter, spec: ModelSpec, rows: int) -> str:
    graph.output("logits", TensorProto.FLOAT, ("R", rows))
    return graph.input("hidden", TensorProto.FLOAT, ("R", spec.hidden_size))


def head_matrix(spec: ModelSpec, weights: Weights, shortlist: Sequence[int] | None, *, again: bool = False) -> Matrix:
    name = "text.embed_tokens.weight" if spec.tied else "head.weight"
    whole = weights.matrix(name, spec.vocab_size, spec.hidden_size, again=again)
    if shortlist is None:
        return whole
    ids = np.asarray(shortlist)

    def read(start: int, stop: int) -> Floats:
        wanted = ids[start:stop]
        between: Floats = whole.read(int(wanted[0]), int(wanted[-1]) + 1)
        found: Floats = between[wanted - wanted[0]]
        return found

    return Matrix(len(ids), whole.columns, read)


def _directions(matrix: Matrix) -> Floats:
    """Orthonormal float32 [D, r]: the eigenvectors of Σ rowᵀ·row, over a sample, with the largest eigenvalues."""
    parts = slices(matrix)
    chosen = parts[:: max(1, len(parts) // SAMPLED_SLICES)]
    gram = np.zeros((matrix.columns, matrix.columns), np.float32)
    for start, stop in chosen:
        rows = matrix.read(start, stop)
        gram += rows.T @ rows
    rank = min(matrix.columns, -(-matrix.columns // RANK_PART // RANK_STEP) * RANK_STEP)
    return np.ascontiguousarray(np.linalg.eigh(gram)[1][:, -rank:])


def _project(matrix: Matrix, directions: Floats) -> Matrix:
    def read(start: int, stop: int) -> Floats:
        whole = [(max(a, start), min(b, stop)) for a, b in slices(matrix) if a < stop and b > start]
        return np.concatenate([matrix.read(a, b) @ directions for a, b in whole])

    return Matrix(matrix.rows, directions.shape[1], read)
