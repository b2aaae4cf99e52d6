"""How each matrix of a package is rounded: to which grid, and by which rule.

Knows no graph: `convert.graph` asks it for the codes of each matrix that it stores.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from iotd.convert.gptq import Statistics, gptq
from iotd.convert.quantize import Blocks, quantize
from iotd.convert.weights import Matrix, slices
from iotd.model.package import Block, Recipe, VisionBits

EMBEDDING = "text.embed_tokens"
HEAD = "head"
"""Also the embedding, where the two are one matrix."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Whole numbers of `bits`, of a scale for each `block` of a row; with 16 or 32 bits floats of that many."""

    bits: VisionBits
    block: Block


class Rounding(Protocol):
    def grid(self, name: str) -> Grid: ...

    def blocks(self, name: str, weight: Matrix) -> Iterable[Blocks]:
        """Slices of rows, one after the other."""
        ...


@dataclass(frozen=True, slots=True)
class Nearest:
    """Each weight to the nearest level."""

    recipe: Recipe

    def grid(self, name: str) -> Grid:
        recipe = self.recipe
        if name.startswith("vision."):
            return Grid(recipe.vision_bits, recipe.block)
        # A table of its own costs nothing but space on disk, as its rows are read one by one.
        return Grid(8 if name == EMBEDDING and recipe.bits == 4 else recipe.bits, recipe.block)

    def blocks(self, name: str, weight: Matrix) -> Iterable[Blocks]:
        grid = self.grid(name)
        return (quantize(weight.read(start, stop), grid.bits, grid.block) for start, stop in slices(weight))


@dataclass(frozen=True, slots=True)
class ByInputs:
    """By what each matrix is multiplied by; what that is not known of, to the nearest level.

    Most were rounded before, and their codes are in a store; those of `statistics` are rounded when they are asked for.
    """

    nearest: Nearest
    codes: "CodeStore"
    statistics: dict[str, Statistics] = field(default_factory=dict)

    def grid(self, name: str) -> Grid:
        return self.nearest.grid(name)

    def blocks(self, name: str, weight: Matrix) -> Iterable[Blocks]:
        grid = self.grid(name)
        if name in self.statistics:
            known = self.statistics[name]
            return (gptq(weight.read(start, stop), grid.bits, grid.block, known) for start, stop in slices(weight))
        if name in self.codes:
            return [self.codes.read(name, weight, grid)]
        return self.nearest.blocks(name, weight)


@dataclass(frozen=True, slots=True)
class CodeStore:
    """Codes and scales of matrices in files of a folder, which outlive an interrupt."""

    folder: Path

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def write(self, name: str, blocks: Blocks) -> None:
        unfinished = self.folder / "unfinished.npz"
        np.savez(unfinished, codes=blocks.codes, scales=blocks.scales)
        unfinished.replace(self._path(name))

    def read(self, name: str, weight: Matrix, grid: Grid) -> Blocks:
        with np.load(self._path(name)) as found:
            return Blocks(found["codes"], found["scales"], grid.bits, weight.columns)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"
