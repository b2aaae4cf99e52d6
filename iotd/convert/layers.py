"""Runs a model layer by layer over texts, in onnxruntime, from what `convert.stack` writes of it."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iotd.convert.graph import GraphWriter
from iotd.convert.quantize import dequantize
from iotd.convert.rounding import EMBEDDING, HEAD, Nearest, Rounding
from iotd.convert.stack import Stack
from iotd.convert.weights import Matrix, slices
from iotd.model.package import Recipe
from iotd.model.session import Threads, open_session

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
FLOAT = Nearest(Recipe(name="fp32", bits=32, vision_bits=32))
Write = Callable[[GraphWriter], None]
Inputs = list[tuple[Floats, dict[str, Matrix]]]
"""Of each value in a layer that matrices are multiplied by E[x·xᵀ], float32 [columns, columns], and those matrices."""


class Layers:
    """One stack and some texts, which go through it as one stream, float32 [n, D], each text by itself."""

    def __init__(self, stack: Stack, texts: Sequence[Ints], work: Path) -> None:
        """texts: sequences of tokens, int64 [T]. work: an existing folder, for one layer's graph at a time."""
        self.stack = stack
        self._texts = texts
        self._ends = np.cumsum([len(text) for text in texts])
        self._folder = work / "piece"
        self._threads = Threads.of_all_cores()

    def embedded(self, rounding: Rounding) -> Floats:
        """The texts' embeddings, as the table has them when it is rounded."""
        used, at = np.unique(np.concatenate(self._texts), return_inverse=True)
        rows = _rows_of(self.stack.embedding(), used)
        name = HEAD if self.stack.head() is None else EMBEDDING
        if rounding.grid(name).bits != 32:
            rows = np.concatenate([dequantize(blocks) for blocks in rounding.blocks(name, Matrix.of(rows))])
        found: Floats = rows[at]
        return found

    def through(self, i: int, stream: Floats, rounding: Rounding) -> Floats:
        """The stream before layer i to what is behind it."""
        out = np.empty_like(stream)
        with self._piece(rounding, lambda graph: self.stack.write_layer(graph, i)) as piece:
            for part in self.parts(len(stream)):
                feeds = self.stack.feeds(i, part.stop - part.start)
                out[part] = piece.run(["residual_out"], stream[part], feeds)[0]
        return out

    def through_end(self, stream: Floats) -> Floats:
        """The stream behind the last layer to hidden states, of which the head makes logits."""
        with self._piece(FLOAT, self.stack.write_end) as piece:
            return np.concatenate([piece.run(["hidden"], stream[part], {})[0] for part in self.parts(len(stream))])

    def hidden(self, rounding: Rounding) -> Floats:
        """Hidden states of all tokens, float32 [n, D], of the whole model on one rounding."""
        stream = self.embedded(rounding)
        for i in range(self.stack.n_layers):
            stream = self.through(i, stream, rounding)
        return self.through_end(stream)

    def inputs(self, i: int, stream: Floats) -> Inputs:
        """Of layer i in float32, before which the stream, or a beginning of it that ends with a text, stands."""
        with self._piece(FLOAT, lambda graph: self.stack.write_layer(graph, i), taps=True) as piece:
            moments: dict[str, Floats] = {}
            for part in self.parts(len(stream)):
                feeds = self.stack.feeds(i, part.stop - part.start)
                for x, values in zip(piece.taps, piece.run(list(piece.taps), stream[part], feeds), strict=True):
                    product = values.T @ values
                    moments[x] = moments[x] + product if x in moments else product
        return [(moments.pop(x) / np.float32(len(stream)), matrices) for x, matrices in piece.taps.items()]

    def parts(self, n: int) -> Iterator[slice]:
        """Where each of the texts lies in the stream, up to its n-th token."""
        start = 0
        for end in self._ends:
            if end <= n:
                yield slice(start, int(end))
            start = int(end)

    def _piece(self, rounding: Rounding, write: Write, *, taps: bool = False) -> "_Piece":
        return _Piece(self._folder, rounding, write, self._threads, taps)


class _Piece:
    """A graph of a part of the model, for as long as it is needed."""

    def __init__(self, folder: Path, rounding: Rounding, write: Write, threads: Threads, taps: bool) -> None:
        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = folder / "piece.onnx"
        self.taps: dict[str, dict[str, Matrix]] = {}
        """The matrices that each value is multiplied by."""
        with GraphWriter(path, rounding) as graph:
            write(graph)
            for name, linear in graph.linears.items() if taps else ():
                self.taps.setdefault(linear.x, {})[name] = linear.weight
                graph.show(linear.x, 1, "T", linear.weight.columns)
        self._session = open_session(path, threads)

    def __enter__(self) -> "_Piece":
        return self

    def __exit__(self, *_: object) -> None:
        del self._session
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, wanted: list[str], residual: Floats, feeds: dict[str, NDArray[Any]]) -> list[Floats]:
        """Of float32 [T, D] some values, each float32 [T, columns]."""
        return [values[0] for values in self._session.run(wanted, {"residual": residual[None], **feeds})]


def _rows_of(weight: Matrix, ids: Ints) -> Floats:
    """Some rows, int64 [n] ascending, of a matrix that is read in slices: float32 [n, columns]."""
    found = np.empty((len(ids), weight.columns), np.float32)
    for start, stop in slices(weight):
        inside = slice(*np.searchsorted(ids, [start, stop]))
        if inside.start < inside.stop:
            found[inside] = weight.read(start, stop)[ids[inside] - start]
    return found
