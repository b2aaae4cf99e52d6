"""Reads GGUF files, as https://github.com/ggml-org/ggml/blob/master/docs/gguf.md has them: metadata and raw tensors.

The `gguf` package reads them, too, but takes a minute for a vocabulary of 262,144 tokens. Knows no quantised type.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
VERSIONS = (2, 3)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in the file."""

    shape: tuple[int, ...]
    """Rows first, as numpy has it."""
    kind: int
    """Number of its type in ggml."""
    offset: int
    """First byte in the file."""


class GGUFFile:
    """One opened file. Its tensors are mapped, not read."""

    def __init__(self, path: Path) -> None:
        self._bytes = np.memmap(path, np.uint8, "r")
        cursor = _Cursor(self._bytes)
        magic, version, n_tensors, n_fields = cursor.take("4sIQQ")
        if magic != b"GGUF" or version not in VERSIONS:
            raise ValueError(f"{path} is no GGUF file of version {VERSIONS}")
        self.fields: dict[str, Any] = {}
        for _ in range(n_fields):
            name = cursor.text()
            self.fields[name] = cursor.value(*cursor.take("I"))
        found = {cursor.text(): self._stored(cursor) for _ in range(n_tensors)}
        alignment = self.fields.get("general.alignment", 32)
        start = -(-cursor.at // alignment) * alignment
        self.tensors = {
            name: Stored(tensor.shape, tensor.kind, start + tensor.offset) for name, tensor in found.items()
        }

    def data(self, tensor: Stored, nbytes: int) -> NDArray[np.uint8]:
        """The first `nbytes` bytes of a tensor."""
        return np.asarray(self._bytes[tensor.offset : tensor.offset + nbytes])

    @staticmethod
    def _stored(cursor: "_Cursor") -> Stored:
        (n_sides,) = cursor.take("I")
        *sides, kind, offset = cursor.take(f"{n_sides}QIQ")
        return Stored(tuple(reversed(sides)), kind, offset)


class _Cursor:
    def __init__(self, values: NDArray[np.uint8]) -> None:
        self._view = memoryview(values)
        self.at = 0

    def take(self, layout: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{layout}", self._view, self.at)
        self.at += struct.calcsize(f"<{layout}")
        return found

    def text(self) -> str:
        (length,) = self.take("Q")
        self.at += length
        return bytes(self._view[self.at - length : self.at]).decode()

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])[0]
        item, length = self.take("IQ")
        if item in _SCALARS:
            return list(self.take(f"{length}{_SCALARS[item]}"))
        return [self.value(item) for _ in range(length)]
