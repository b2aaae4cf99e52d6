"""Tensors of a checkpoint, held against the shapes that its config.json promises."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from iotd.convert.checkpoint import Checkpoint
from iotd.errors import CheckpointError

Floats = NDArray[np.float32]
Progress = Callable[[int], None]
"""Called with the number of elements just read."""


SLICE_ELEMENTS = 1 << 22
"""Matrices are read in slices of rows of about this size: 16 MB as float32."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A float32 [rows, columns] matrix that is read in slices of rows, so that it need never be whole in memory."""

    rows: int
    columns: int
    read: Callable[[int, int], Floats]

    @classmethod
    def of(cls, values: Floats) -> "Matrix":
        return cls(values.shape[0], values.shape[1], lambda start, stop: values[start:stop])


def slices(weight: Matrix) -> list[tuple[int, int]]:
    """First and last row, behind it, of each part in which a matrix is read."""
    rows = max(1, SLICE_ELEMENTS // weight.columns)
    return [(start, min(start + rows, weight.rows)) for start in range(0, weight.rows, rows)]


class Weights(Protocol):
    """Named float32 tensors, of the shapes that config.json implies. Both raise CheckpointError for what is not so."""

    def tensor(self, name: str, *shape: int) -> Floats:
        """The whole tensor."""
        ...

    def matrix(self, name: str, rows: int, columns: int, *, again: bool = False) -> Matrix:
        """A matrix to be read in slices of rows. again: it has been read before, and makes no progress."""
        ...


class CheckpointWeights:
    """The tensors of a checkpoint, held against the shapes asked for; reports the elements read as progress."""

    def __init__(self, checkpoint: Checkpoint, progress: Progress) -> None:
        self._checkpoint = checkpoint
        self._progress = progress

    def tensor(self, name: str, *shape: int) -> Floats:
        self._check(name, shape)
        return self._read(name, 0, None)

    def matrix(self, name: str, rows: int, columns: int, *, again: bool = False) -> Matrix:
        self._check(name, (rows, columns))
        return Matrix(rows, columns, lambda start, stop: self._read(name, start, stop, again))

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if not self._checkpoint.has(name):
            raise CheckpointError(
                f"the checkpoint lacks tensor {self._checkpoint.stored_name(name)}, which its config.json promises"
            )
        found = self._checkpoint.shape(name)
        if found != shape:
            raise CheckpointError(
                f"tensor {self._checkpoint.stored_name(name)} has shape {list(found)}, config.json says {list(shape)}: "
                "they are not of one checkpoint"
            )

    def _read(self, name: str, start: int, stop: int | None, again: bool = False) -> Floats:
        try:
            values = self._checkpoint.read(name, start, stop)
        except (OSError, SafetensorError) as error:
            stored = self._checkpoint.stored_name(name)
            raise CheckpointError(
                f"cannot read tensor {stored}: {error}; the file is truncated, fetch it again"
            ) from error
        if not np.isfinite(values).all():
            stored = self._checkpoint.stored_name(name)
            raise CheckpointError(f"tensor {stored} holds values that are not finite: the checkpoint is damaged")
        if not again:
            self._progress(values.size)
        return values
