"""The tokenizer's file: a JSON header and flat little-endian arrays, read through a memory map.

Knows where bytes lie and not what they mean. Mapped pages belong to the file, so the kernel can drop and re-read them.
"""

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iotd.errors import PackageError

MAGIC = b"iotdtok\n"
FORMAT = 1
_ALIGN = 64

Array = NDArray[np.uint8] | NDArray[np.uint32]
Table = memoryview


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """An open tokenizer file. Reading one element of a table gives a Python int at about a third of numpy's cost."""

    header: Mapping[str, Any]
    tables: Mapping[str, Table]


def write_tokenizer_file(path: Path, header: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Write header and arrays (uint8 or uint32, one axis each). The same input gives the same bytes."""
    layout, offset = {}, 0
    for name, array in arrays.items():
        layout[name] = [array.dtype.name, offset, array.size]
        offset = _aligned(offset + array.nbytes)
    text = json.dumps({"format": FORMAT, **header, "tables": layout}, sort_keys=True).encode()
    with path.open("wb") as out:
        out.write(MAGIC + len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            out.write(bytes(_aligned(out.tell()) - out.tell()))
            out.write(array.astype(array.dtype.newbyteorder("<")).tobytes())


def read_tokenizer_file(path: Path) -> TokenizerFile:
    """Map the file. Raises PackageError where it is missing, truncated, or of another format."""
    try:
        with path.open("rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise PackageError(f"the tokenizer {path} cannot be read: {error}") from error
    start = len(MAGIC) + 8
    if bytes(view[: len(MAGIC)]) != MAGIC:
        raise PackageError(f"{path} is not a tokenizer of iotd: convert the checkpoint again")
    end = start + int.from_bytes(view[len(MAGIC) : start], "little")
    try:
        header = json.loads(bytes(view[start:end]))
        if header["format"] != FORMAT:
            raise PackageError(f"{path} has tokenizer format {header['format']}, this version reads {FORMAT}")
        tables = {name: _table(view, _aligned(end), *place) for name, place in header["tables"].items()}
    except (ValueError, KeyError, TypeError) as error:
        raise PackageError(f"the tokenizer {path} is damaged: {error}") from error
    return TokenizerFile(header, tables)


def _table(view: memoryview, base: int, dtype: str, offset: int, size: int) -> Table:
    nbytes = size * np.dtype(dtype).itemsize
    part = view[base + offset : base + offset + nbytes]
    if len(part) != nbytes:
        raise ValueError(f"{nbytes} bytes expected at {base + offset}, {len(part)} found")
    return part.cast("I") if dtype == "uint32" else part


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN
