"""Rows of a package's tables, read from its files when they are needed; no table is ever in memory as floats."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
from numpy.typing import DTypeLike, NDArray

from iotd.errors import PackageError
from iotd.model.package import TableEntry

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
SCALES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2")}
RECENT = 4096
"""Rows that are kept as they are in the file: of the 512 that count most for a hidden state, 70 % counted for one of
the last few (SmolLM2 and Gemma 3, prose and sensor lines)."""
_NIBBLES = np.stack([np.arange(256) & 0x0F, np.arange(256) >> 4], axis=1).astype(np.float32) - 8
_PAIRS = _NIBBLES.view(np.uint64)[:, 0]
"""[256]: the two values in a byte, a pair of float32."""


class RowTable:
    """Looks up the rows of one matrix."""

    def __init__(
        self, folder: Path, entry: TableEntry, rows: int, columns: int, first: NDArray[np.int64] | None = None
    ) -> None:
        """first: tokens, ascending, whose rows stand before those of all others. None: each stands where its number is.

        Raises PackageError where the file does not hold that table.
        """
        path = folder / entry.file
        self._first = first
        self._columns = columns
        self._bits = entry.bits
        self._block = entry.block
        self._n_rows = rows
        self._recent: _Recent | None = None
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

    def rows(self, token_ids: Ints, out: Floats) -> None:
        """Write the rows int64 [T] into float32 [T, D]. They must be within the table.

        Raises PackageError where the file has become shorter since it was opened.
        """
        if self._first is not None:
            token_ids = _behind(self._first, token_ids)
        codes = self._codes.read(token_ids)
        if self._bits == 32:
            out[...] = codes
            return
        if self._bits == 4:
            codes = np.stack([codes & 0x0F, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
        scales = widened(self._scales.read(token_ids))
        values = (codes.astype(np.float32) - (1 << (self._bits - 1))) * scales[..., None]
        out[...] = values.reshape(len(token_ids), -1)[:, : self._columns]

    def products(self, row_ids: Ints, vector: Floats) -> Floats:
        """The rows int64 [n], times float32 [D] → float32 [n]. Raises PackageError as `rows` does."""
        found = np.empty(len(row_ids), np.float32)
        for start in range(0, len(row_ids), RECENT // 2):
            part = slice(start, start + RECENT // 2)
            found[part] = self._product(row_ids[part], vector)
        return found

    def _product(self, row_ids: Ints, vector: Floats) -> Floats:
        if self._recent is None:
            parts = [self._codes] if self._bits == 32 else [self._codes, self._scales]
            self._recent = _Recent(parts, self._n_rows)
        codes, *scales = self._recent.read(row_ids)
        if self._bits == 32:
            whole: Floats = codes @ vector
            return whole
        n, blocks = codes.shape[:2]
        # One look-up for both values in a byte takes half the time of masks and shifts.
        values = _PAIRS.take(codes).view(np.float32) if self._bits == 4 else codes.astype(np.float32) - 128
        padded = np.zeros((blocks, self._block), np.float32)
        padded.reshape(-1)[: self._columns] = vector
        sums = np.einsum("nbk,bk->nb", values.reshape(n, blocks, -1), padded)
        products: Floats = np.einsum("nb,nb->n", sums, widened(scales[0]))
        return products


def _behind(first: NDArray[np.int64], token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the rows of tokens stand, int64 [T]."""
    at = np.searchsorted(first, token_ids)
    listed = first[at.clip(max=len(first) - 1)] == token_ids
    return np.where(listed, at, len(first) + token_ids - at)


def widened(scales: NDArray[Any]) -> Floats:
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

    def room(self, n: int) -> NDArray[Any]:
        """For so many rows."""
        return np.empty((n, *self._shape), self._dtype)

    def read(self, ids: Ints) -> NDArray[Any]:
        """Of int64 [n] the rows, [n, *shape]."""
        found = self.room(len(ids))
        for row, at in zip(found, ids.tolist(), strict=True):
            if os.preadv(self._file.descriptor, [row.data], self._offset + at * self._nbytes) != self._nbytes:
                raise PackageError(f"{self._file.path} has become shorter: copy the package again")
        return found


class _Recent:
    """Rows that were wanted lately, kept as they are in the file: no more than RECENT of them."""

    def __init__(self, parts: Sequence[_Rows], n_rows: int) -> None:
        """parts: what a row is made of."""
        self._parts = parts
        self._kept = [part.room(RECENT) for part in parts]
        self._slot = np.full(n_rows, -1, np.int32)
        """Where each row is kept, or -1."""
        self._owner = np.full(RECENT, -1, np.int64)
        self._next = 0

    def read(self, ids: Ints) -> list[NDArray[Any]]:
        """Of int64 [n], at most half of RECENT, the rows' parts, each [n, ...]."""
        while len(missing := ids[self._slot[ids] < 0]):  # a row that is taken in can put out one of the others
            self._take_in(missing)
        slots = self._slot[ids]
        return [kept[slots] for kept in self._kept]

    def _take_in(self, ids: Ints) -> None:
        slots = (self._next + np.arange(len(ids))) % RECENT
        self._next = int(slots[-1]) + 1
        for kept, part in zip(self._kept, self._parts, strict=True):
            kept[slots] = part.read(ids)
        owners = self._owner[slots]
        self._slot[owners[owners >= 0]] = -1
        self._owner[slots] = ids
        self._slot[ids] = slots
