"""Rows of a package's tables, read from its files when they are needed; no table is ever in memory as floats."""

import math
import os
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
from numpy.typing import DTypeLike, NDArray

from iotd.errors import PackageError
from iotd.model.package import TableEntry

Floats = NDArray[np.float32]
SCALES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2")}


class RowTable:
    """Looks up the rows of one matrix."""

    def __init__(self, folder: Path, entry: TableEntry, rows: int, columns: int) -> None:
        """Raises PackageError where the file does not hold that table."""
        path = folder / entry.file
        self._columns = columns
        self._bits = entry.bits
        blocks = -(-columns // entry.block)
        codes = (columns,) if entry.bits == 32 else (blocks, entry.block * entry.bits // 8)
        try:
            file = _File(path)
            self._codes = _Rows(file, entry.codes_offset, rows, codes, np.float32 if entry.bits == 32 else np.uint8)
            if entry.bits != 32:
                self._scales = _Rows(file, entry.scales_offset, rows, (blocks,), SCALES[entry.scales])
        except (OSError, ValueError) as error:
            raise PackageError(
                f"{path} does not hold the rows its manifest describes ({error}): convert it again"
            ) from error

    def rows(self, token_ids: NDArray[np.int64], out: Floats) -> None:
        """Write the rows int64 [T] into float32 [T, D]. They must be within the table.

        Raises PackageError where the file has become shorter since it was opened.
        """
        codes = self._codes.read(token_ids)
        if self._bits == 32:
            out[...] = codes
            return
        if self._bits == 4:
            codes = np.stack([codes & 0x0F, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
        scales = _widened(self._scales.read(token_ids))
        values = (codes.astype(np.float32) - (1 << (self._bits - 1))) * scales[..., None]
        out[...] = values.reshape(len(token_ids), -1)[:, : self._columns]


def _widened(scales: NDArray[Any]) -> Floats:
    """float32 of what is kept as float32, or as the upper half of it."""
    if scales.dtype == np.float32:
        return scales
    return (scales.astype(np.uint32) << np.uint32(16)).view(np.float32)


class _File:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        finalize(self, os.close, self.descriptor)
        self.nbytes = os.fstat(self.descriptor).st_size


class _Rows:
    """Rows of one length that lie behind each other in a file.

    They are read, not mapped: of a mapped file each row that was ever needed counts as memory of the process, with its
    neighbours.
    """

    def __init__(self, file: _File, offset: int, rows: int, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        """Raises ValueError where the file ends before they do."""
        self._file = file
        self._offset = offset
        self._shape = shape
        self._dtype = np.dtype(dtype)
        self._nbytes = math.prod(shape) * self._dtype.itemsize
        if offset + rows * self._nbytes > file.nbytes:
            raise ValueError(f"it has {file.nbytes} bytes, and {offset + rows * self._nbytes} are needed")

    def read(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        """Of int64 [n] the rows, [n, *shape]."""
        found = np.empty((len(ids), *self._shape), self._dtype)
        for row, at in zip(found, ids.tolist(), strict=True):
            if os.preadv(self._file.descriptor, [row.data], self._offset + at * self._nbytes) != self._nbytes:
                raise PackageError(f"{self._file.path} has become shorter: copy the package again")
        return found
