"""What the yardstick compares: ways to round a stack, conversion's own and llama.cpp's. Knows no metric."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from iotd.convert.calibrate import Calibrator
from iotd.convert.coarse import HiddenStates
from iotd.convert.convert import RECIPES, THOROUGH
from iotd.convert.layers import FLOAT, Layers
from iotd.convert.rounding import Nearest, Rounding
from iotd.convert.samples import sequences
from iotd.convert.stack import Stack
from iotd.convert.weights import Matrix, slices
from iotd.model.package import Recipe
from yardstick.balance import Balanced
from yardstick.grids import mixture, on_grid
from yardstick.sources import Source
from yardstick.stacks import open_stack
from yardstick.tokens import Calibrating

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
DEFAULT = "int4"
"""Of conversion's recipes."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """A stack as a recipe has it."""

    stack: Stack
    rounding: Rounding
    """Of the stack, for graphs."""
    hidden: Floats
    """float32 [n, D]: the states of all texts behind the last norm."""
    bits: float
    """Of a weight in the files, scales and the table included."""
    calibrated: HiddenStates | None = None
    """Those of the texts that it was calibrated on; None where it was not."""


Round = Callable[[Source, Calibrating, Sequence[Ints], Path], Rounded]
"""Rounds a model and runs it over texts, which only measure. The folder is the recipe's own."""


def recipes() -> dict[str, Round]:
    """All that can be asked for, by name."""
    found: dict[str, Round] = {"default": _calibrated(RECIPES[DEFAULT]), "none": _nearest(RECIPES[DEFAULT])}
    for name, recipe in RECIPES.items():
        found[name] = _calibrated(recipe) if recipe.bits == 4 else _nearest(recipe)
        if recipe.bits == 4:
            found[f"none{name.removeprefix(DEFAULT)}"] = _nearest(recipe)
    return {**found, "q4_k_m": _q4_k_m}


def _nearest(recipe: Recipe) -> Round:
    """As `iotd convert --calibrate none` does it."""

    def round_(source: Source, _: Calibrating, texts: Sequence[Ints], work: Path) -> Rounded:
        sizes = Sizes()
        stack, rounding = open_stack(source, sizes.note), Nearest(recipe)
        hidden = Layers(stack, texts, work).hidden(rounding)
        return Rounded(stack, rounding, hidden, sizes.bits(rounding))

    return round_


def _calibrated(recipe: Recipe) -> Round:
    """As `iotd convert` does it."""

    def round_(source: Source, tokenizer: Calibrating, texts: Sequence[Ints], work: Path) -> Rounded:
        sizes = Sizes()
        stack = open_stack(Balanced(source), sizes.note)
        known = sequences(tokenizer, None, n_tokens=THOROUGH.n_tokens, seed=THOROUGH.seed)
        fit, held = ([tokenizer.begun(text.ids) for text in part] for part in (known.fit, known.held))
        calibrated = msgspec.structs.replace(recipe, calibrated=True)
        found = Calibrator(stack, [*fit, *held, *texts], len(fit), calibrated, work).run()
        of_fit, of_held, of_texts = np.split(found.hidden, np.cumsum([sum(map(len, part)) for part in (fit, held)]))
        bits = sizes.bits(found.rounding)
        return Rounded(stack, found.rounding, of_texts, bits, HiddenStates(of_fit, of_held))

    return round_


def _q4_k_m(source: Source, _: Calibrating, texts: Sequence[Ints], work: Path) -> Rounded:
    """llama.cpp's mixture of grids, multiplied in float32."""
    grids = _Grids(source.field(f"{source.field('general.architecture')}.block_count"), work)
    stack = open_stack(source, grids.stored)
    return Rounded(stack, FLOAT, Layers(stack, texts, work).hidden(FLOAT), grids.bits)


class Sizes:
    """Notes the sizes of the matrices that a stack stores."""

    def __init__(self) -> None:
        self._sides: dict[str, tuple[int, int]] = {}

    def note(self, name: str, weight: Matrix) -> Matrix:
        self._sides[name] = weight.rows, weight.columns
        return weight

    def bits(self, rounding: Rounding) -> float:
        """Of a weight, in files: whole blocks, and 16 bits for the scale of each."""
        nbits = 0.0
        for name, (rows, columns) in self._sides.items():
            grid = rounding.grid(name)
            blocks = rows * -(-columns // grid.block)
            nbits += rows * columns * 32 if grid.bits == 32 else blocks * (grid.block * grid.bits + 16)
        return nbits / sum(math.prod(sides) for sides in self._sides.values())


class _Grids:
    """Puts matrices on the grids of the mixture, once each: the search takes its time."""

    def __init__(self, n_layers: int, work: Path) -> None:
        self._n_layers = n_layers
        self._work = work
        self._found: dict[str, Floats] = {}
        self._nbits = 0.0

    def stored(self, name: str, weight: Matrix) -> Matrix:
        if name not in self._found:
            grid = mixture(name, self._n_layers)
            path = self._work / f"{name}.npy"
            values: Floats = np.lib.format.open_memmap(path, "w+", np.float32, (weight.rows, weight.columns))
            for start, stop in slices(weight):
                values[start:stop] = on_grid(weight.read(start, stop), grid)
            self._found[name] = values
            self._nbits += grid.nbits * values.size
        return Matrix.of(self._found[name])

    @property
    def bits(self) -> float:
        """Of a weight, in llama.cpp's files."""
        return self._nbits / sum(values.size for values in self._found.values())
