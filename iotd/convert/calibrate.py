"""Calibration: texts go through the model layer by layer, and each matrix is rounded by what it is multiplied by.

Twice: once in float32, for what the last layer should give; then each layer is fed by what the quantised ones before it
give, its matrices are rounded, and it is run again as it will be, with int8 activations. Both in onnxruntime, with one
layer in memory at a time. What is done lies in a work folder, and is not done again after an interrupt.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iotd.convert.gptq import Statistics, gptq
from iotd.convert.graph import GraphWriter, Linear
from iotd.convert.quantize import dequantize
from iotd.convert.rounding import EMBEDDING, HEAD, ByInputs, CodeStore, Nearest, Rounding
from iotd.convert.stack import Stack
from iotd.convert.weights import Matrix, slices
from iotd.model.package import Recipe
from iotd.model.session import Threads, open_session

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Advance = Callable[[float], None]
"""Called with the part of the whole that was just done."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What calibration found."""

    rounding: ByInputs
    hidden: Floats
    """float32 [n, D]: what the quantised layers give for all tokens, normalised."""
    reference: Floats
    """float32 [n, D]: what they give in float32."""


class Calibrator:
    """Calibrates one model on some texts."""

    def __init__(
        self,
        stack: Stack,
        texts: Sequence[Ints],
        n_fit: int,
        recipe: Recipe,
        work: Path,
        advance: Advance = lambda _: None,
    ) -> None:
        """texts: sequences of tokens, int64 [T]; the first `n_fit` count for the rounding, the others only go along.

        work: an existing folder; it must be given for the same model, texts and recipe again, or be empty.
        """
        self._stack = stack
        self._texts = texts
        self._ends = np.cumsum([len(text) for text in texts])
        self._fit = slice(0, int(self._ends[n_fit - 1]))
        self._work = work
        self._threads = Threads(len(os.sched_getaffinity(0)))
        self._nearest = Nearest(recipe)
        self._float = Nearest(Recipe(name="fp32", bits=32, vision_bits=32))
        self._codes = CodeStore(work)
        self._advance = advance

    def run(self) -> Calibrated:
        reference = self._reference()
        found = ByInputs(self._nearest, self._codes)
        moment = second_moment(reference[self._fit])
        found.statistics[HEAD] = Statistics.of(moment)
        done = self._done()
        stream = np.load(self._stream(done)) if done else self._embedded(found)
        for i in range(done, self._stack.n_layers):
            stream = self._calibrate_layer(i, stream, found)
            self._save(self._stream(i + 1), stream)
            self._stream(i).unlink(missing_ok=True)
            self._advance(1 / (self._stack.n_layers))
        return Calibrated(found, self._through_end(stream), reference)

    def _reference(self) -> Floats:
        path = self._work / "reference.npy"
        if not path.exists():
            stream = self._embedded(self._float)
            for i in range(self._stack.n_layers):
                stream = self._through_layer(i, stream, self._float)
            self._save(path, self._through_end(stream))
        found: Floats = np.load(path)
        return found

    def _calibrate_layer(self, i: int, stream: Floats, found: ByInputs) -> Floats:
        with self._piece(self._float, lambda graph: self._stack.write_layer(graph, i), taps=True) as piece:
            moments = self._moments(i, piece, stream[self._fit])
            for x, names in piece.shared.items():
                self._round(names, piece.linears, Statistics.of(moments.pop(x)))
        return self._through_layer(i, stream, found)

    def _moments(self, i: int, piece: "_Piece", stream: Floats) -> dict[str, Floats]:
        """Of each value that matrices are multiplied by the second moment, by its name."""
        moments: dict[str, Floats] = {}
        for part in self._parts(len(stream)):
            feeds = self._stack.feeds(i, part.stop - part.start)
            for x, values in zip(piece.shared, piece.run(list(piece.shared), stream[part], feeds), strict=True):
                product = values.T @ values
                moments[x] = moments[x] + product if x in moments else product
        return {x: moment / np.float32(len(stream)) for x, moment in moments.items()}

    def _round(self, names: Sequence[str], linears: dict[str, Linear], statistics: Statistics) -> None:
        for name in names:
            if name not in self._codes:
                grid, weight = self._nearest.grid(name), linears[name].weight
                self._codes.write(name, gptq(weight.read(0, weight.rows), grid.bits, grid.block, statistics))

    def _through_layer(self, i: int, stream: Floats, rounding: Rounding) -> Floats:
        """float32 [n, D], before layer i, to what is behind it."""
        out = np.empty_like(stream)
        with self._piece(rounding, lambda graph: self._stack.write_layer(graph, i)) as piece:
            for part in self._parts(len(stream)):
                feeds = self._stack.feeds(i, part.stop - part.start)
                out[part] = piece.run(["residual_out"], stream[part], feeds)[0]
        return out

    def _through_end(self, stream: Floats) -> Floats:
        with self._piece(self._float, self._stack.write_end) as piece:
            return np.concatenate([piece.run(["hidden"], stream[part], {})[0] for part in self._parts(len(stream))])

    def _embedded(self, rounding: Rounding) -> Floats:
        """The texts' embeddings, float32 [n, D], as the table has them when it is rounded."""
        ids = np.concatenate(self._texts)
        used, at = np.unique(ids, return_inverse=True)
        rows = rows_of(self._stack.embedding(), used)
        name = HEAD if self._stack.head() is None else EMBEDDING
        if rounding.grid(name).bits != 32:
            rows = np.concatenate([dequantize(blocks) for blocks in rounding.blocks(name, Matrix.of(rows))])
        found: Floats = rows[at]
        return found

    def _parts(self, n: int) -> Iterator[slice]:
        """Where each of the texts lies in the stream, up to its n-th token."""
        start = 0
        for end in self._ends:
            if end <= n:
                yield slice(start, int(end))
            start = int(end)

    def _piece(self, rounding: Rounding, write: Callable[[GraphWriter], None], *, taps: bool = False) -> "_Piece":
        return _Piece(self._work / "piece", rounding, write, self._threads, taps)

    def _done(self) -> int:
        """Layers that are calibrated."""
        return max((int(path.stem.removeprefix("stream-")) for path in self._work.glob("stream-*.npy")), default=0)

    def _stream(self, i: int) -> Path:
        """What the first i layers give."""
        return self._work / f"stream-{i}.npy"

    def _save(self, path: Path, values: Floats) -> None:
        unfinished = self._work / "unfinished.npy"
        np.save(unfinished, values)
        unfinished.replace(path)


class _Piece:
    """A graph of one layer, for as long as it is needed."""

    def __init__(
        self, folder: Path, rounding: Rounding, write: Callable[[GraphWriter], None], threads: Threads, taps: bool
    ) -> None:
        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = folder / "piece.onnx"
        with GraphWriter(path, rounding) as graph:
            write(graph)
            self.linears = dict(graph.linears)
            self.shared: dict[str, list[str]] = {}
            """The matrices that each value is multiplied by."""
            for name, linear in self.linears.items() if taps else ():
                self.shared.setdefault(linear.x, []).append(name)
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


def second_moment(values: Floats) -> Floats:
    """E[x·xᵀ] over the rows of float32 [n, columns]."""
    found: Floats = values.T @ values / np.float32(len(values))
    return found


def rows_of(weight: Matrix, ids: Ints) -> Floats:
    """Some rows, int64 [n] ascending, of a matrix that is read in slices: float32 [n, columns]."""
    found = np.empty((len(ids), weight.columns), np.float32)
    for start, stop in slices(weight):
        inside = slice(*np.searchsorted(ids, [start, stop]))
        if inside.start < inside.stop:
            found[inside] = weight.read(start, stop)[ids[inside] - start]
    return found
