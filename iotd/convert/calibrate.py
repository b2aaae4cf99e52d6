"""Calibration: texts go through the model layer by layer, and each matrix is rounded by what it is multiplied by.

Twice: once in float32, for what the last layer should give; then each layer is fed by what the quantised ones before it
give, its matrices are rounded, and it is run again as it will be, with int8 activations. What is done lies in a work
folder, and is not done again after an interrupt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from iotd.convert.gptq import Statistics, gptq
from iotd.convert.layers import FLOAT, Floats, Ints, Layers
from iotd.convert.rounding import HEAD, ByInputs, CodeStore, Nearest
from iotd.convert.stack import Stack
from iotd.model.package import Recipe

Advance = Callable[[float], None]
"""Called with the part of the whole that was just done."""
REFERENCE_PART = 0.25
"""Of the time, that the first pass takes, about."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What calibration found."""

    rounding: ByInputs
    hidden: Floats
    """float32 [n, D]: hidden states of all tokens, by the quantised layers."""
    reference: Floats
    """float32 [n, D]: the same by those in float32."""


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
        self._layers = Layers(stack, texts, work)
        self._n_layers = stack.n_layers
        self._fit = slice(0, sum(len(text) for text in texts[:n_fit]))
        self._work = work
        self._found = ByInputs(Nearest(recipe), CodeStore(work))
        self._advance = advance

    def run(self) -> Calibrated:
        reference = self._reference()
        self._advance(REFERENCE_PART)
        fit = reference[self._fit]
        self._found.statistics[HEAD] = Statistics.of(fit.T @ fit / np.float32(len(fit)))
        done = self._done()
        self._advance(done * (1 - REFERENCE_PART) / self._n_layers)
        stream = np.load(self._stream(done)) if done else self._layers.embedded(self._found)
        for i in range(done, self._n_layers):
            self._round(i, stream[self._fit])
            stream = self._layers.through(i, stream, self._found)
            self._save(self._stream(i + 1), stream)
            self._stream(i).unlink(missing_ok=True)
            self._advance((1 - REFERENCE_PART) / self._n_layers)
        return Calibrated(self._found, self._layers.through_end(stream), reference)

    def _reference(self) -> Floats:
        path = self._work / "reference.npy"
        if not path.exists():
            self._save(path, self._layers.hidden(FLOAT))
        found: Floats = np.load(path)
        return found

    def _round(self, i: int, stream: Floats) -> None:
        """Layer i, by the stream before it."""
        codes = self._found.codes
        for moment, matrices in self._layers.inputs(i, stream):
            statistics = Statistics.of(moment)
            for name, weight in matrices.items():
                grid = self._found.grid(name)
                codes.write(name, gptq(weight.read(0, weight.rows), grid.bits, grid.block, statistics))

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
