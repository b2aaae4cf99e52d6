"""Runs a stack layer by layer over sequences of tokens, so that one layer's weights at most are in memory.

Knows no metric and no recipe.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto
from yardstick.recipes import GridWriter, Writer, size
from yardstick.stacks import LlamaStack

from iotd.convert.graph import GraphWriter
from iotd.model.session import Threads, open_session
from iotd.model.table import RowTable

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class Variant:
    """A stack as one recipe has it. What it writes is in a folder of its own; of the layers one at a time."""

    def __init__(self, stack: LlamaStack, writer: Writer, folder: Path) -> None:
        self._stack = stack
        self._writer = writer
        self._folder = folder
        self._nbits, self._n_weights = 0.0, 0
        self._head = self._write_head()

    @property
    def bits(self) -> float:
        """Of a weight, in the files: matrices of the layers that ran, and the table."""
        return self._nbits / self._n_weights if self._n_weights else 32.0

    def hidden(self, sequences: Sequence[Ints]) -> list[Floats]:
        """Of each sequence int64 [T] the states [T, D] behind the last norm."""
        states = [self._embed(ids) for ids in sequences]
        for i in range(self._stack.n_layers):
            layer = self._open(f"layer.{i}", partial(self._stack.write_layer, i=i))
            for n, state in enumerate(states):
                feeds = {"residual": state[None], **self._stack.feeds(i, len(state))}
                states[n] = layer.run(["residual_out"], feeds)[0][0]
        end = self._open("end", self._stack.write_end)
        return [end.run(["hidden"], {"residual": state[None]})[0][0] for state in states]

    def logits(self, hidden: Floats) -> Floats:
        """Of states [R, D] the logits [R, V]."""
        found: Floats = self._head.run(["logits"], {"hidden": hidden})[0]
        return found

    def _embed(self, ids: Ints) -> Floats:
        rows = np.empty((len(ids), self._stack.hidden_size), np.float32)
        self._table.rows(ids, rows)
        return rows

    def _write_head(self) -> ort.InferenceSession:
        matrix = self._stack.embedding()
        path = self._folder / "head.onnx"
        with self._writer(path) as graph:
            graph.input("hidden", TensorProto.FLOAT, ("R", matrix.columns))
            graph.output("logits", TensorProto.FLOAT, ("R", matrix.rows))
            entry = graph.table("head", matrix)
            graph.matmul("hidden", "head", matrix.columns, matrix.rows, out="logits")
        self._count(graph)
        self._table = RowTable(self._folder, entry, matrix.rows, matrix.columns)
        return _session(path)

    def _open(self, name: str, write: Callable[[GraphWriter], None]) -> ort.InferenceSession:
        """Write a graph and open it. Its files are gone then, and its weights with the session."""
        path = self._folder / f"{name}.onnx"
        with self._writer(path) as graph:
            write(graph)
        self._count(graph)
        session = _session(path)
        path.unlink()
        graph.data_path.unlink()
        return session

    def _count(self, graph: GraphWriter) -> None:
        nbits, n_weights = (graph.nbits, graph.n_weights) if isinstance(graph, GridWriter) else size(graph.path)
        self._nbits += nbits
        self._n_weights += n_weights


def _session(path: Path) -> ort.InferenceSession:
    return open_session(path, Threads(len(os.sched_getaffinity(0))))
