"""Rows of the embedding table, read from the memory-mapped package file; the table is never in memory as floats."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from iotd.errors import PackageError
from iotd.model.package import TableEntry

Floats = NDArray[np.float32]


class EmbeddingTable:
    """Looks up embeddings by token id."""

    def __init__(self, folder: Path, entry: TableEntry, rows: int, columns: int) -> None:
        """Raises PackageError where the file does not hold that table."""
        path = folder / entry.file
        try:
            self._map(path, entry, rows, columns)
        except (OSError, ValueError, OverflowError) as error:
            raise PackageError(
                f"{path} does not hold the embeddings its manifest describes ({error}): convert it again"
            ) from error

    def _map(self, path: Path, entry: TableEntry, rows: int, columns: int) -> None:
        self._columns = columns
        self._bits = entry.bits
        if entry.bits == 32:
            self._floats = np.memmap(path, np.float32, "r", entry.codes_offset, (rows, columns))
            return
        blocks = -(-columns // entry.block)
        shape = (rows, blocks, entry.block * entry.bits // 8)
        self._codes = np.memmap(path, np.uint8, "r", entry.codes_offset, shape)
        self._scales = np.memmap(path, np.float32, "r", entry.scales_offset, (rows, blocks))

    def rows(self, token_ids: NDArray[np.int64], out: Floats) -> None:
        """Write the embeddings of int64 [T] into float32 [T, D]. Ids must be within the vocabulary."""
        if self._bits == 32:
            out[...] = self._floats[token_ids]
            return
        codes = self._codes[token_ids]
        if self._bits == 4:
            codes = np.stack([codes & 0x0F, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
        values = (codes.astype(np.float32) - (1 << (self._bits - 1))) * self._scales[token_ids][..., None]
        out[...] = values.reshape(len(token_ids), -1)[:, : self._columns]
