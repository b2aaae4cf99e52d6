"""Checkpoints to convert from: what `save_pretrained` of transformers writes.

Knows tensor names, shapes and rows; knows nothing of graphs. Tensors are read one at a time, as float32.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - registers bfloat16 with numpy, which safetensors needs to read it
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from iotd.errors import CheckpointError

Floats = NDArray[np.float32]
FLOAT_DTYPES = ("BF16", "F16", "F32")


def canonical_name(name: str) -> str | None:
    """The one place that knows how checkpoints name their weights.

    Returns `text.…`, `vision.…` or `head.weight`; None for weights that iotd does not use (multi-token prediction).
    """
    if name.startswith("mtp."):
        return None
    if name in ("lm_head.weight", "language_model.lm_head.weight"):
        return "head.weight"
    for prefix, canonical in (
        ("model.language_model.", "text."),
        ("model.visual.", "vision."),
        ("language_model.model.", "text."),
        ("visual.", "vision."),
        ("model.", "text."),
    ):
        if name.startswith(prefix):
            return canonical + name.removeprefix(prefix)
    return name


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's folder. Raises CheckpointError naming the file and what is wrong with it."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not an object")
    return found


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a file holds it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it, such as `BF16`."""


class Checkpoint:
    """A folder with config.json and model.safetensors, or its shards with model.safetensors.index.json."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError where a file is missing, truncated or no safetensors."""
        self.name = folder.resolve().name
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self._stored: dict[str, Stored] = {}
        for file in _weight_files(folder):
            self._list(file)
        for shard, missing in _missing_from_shards(folder, {stored.name for stored in self._stored.values()}):
            raise CheckpointError(f"{folder / shard} lacks tensor {missing}, which the index says it holds")

    def _list(self, path: Path) -> None:
        try:
            file = _open(path)
            names = list(file.keys())
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error
        except SafetensorError as error:
            raise CheckpointError(f"{path} is truncated or damaged ({error}): fetch it again") from error
        for name in names:
            if canonical := canonical_name(name):
                part = file.get_slice(name)
                self._stored[canonical] = Stored(path, name, tuple(part.get_shape()), part.get_dtype())

    @property
    def n_elements(self) -> int:
        """Elements of all tensors that iotd knows of."""
        return sum(math.prod(stored.shape) for stored in self._stored.values())

    @property
    def stamp(self) -> str:
        """Changes with the files."""
        paths = sorted({self.folder / "config.json", *(stored.path for stored in self._stored.values())})
        return " ".join(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths)

    def stored_name(self, name: str) -> str:
        """What the checkpoint calls a tensor, or would call it if it had it."""
        if name in self._stored:
            return self._stored[name].name
        part = name.partition(".")[0] + "."
        for canonical, stored in self._stored.items():
            if canonical.startswith(part):
                return stored.name.removesuffix(canonical.removeprefix(part)) + name.removeprefix(part)
        return name

    def has(self, name: str) -> bool:
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Floats:
        """Rows start..stop of a tensor along its first axis, as float32."""
        stored = self._stored[name]
        if stored.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"tensor {stored.name} is {stored.dtype}: iotd reads {', '.join(FLOAT_DTYPES)}; "
                "convert from the unquantised checkpoint"
            )
        # Opened anew each time: pages of a mapped file stay resident as long as it is open.
        part = _open(stored.path).get_slice(stored.name)
        values = part[start:stop] if stored.shape else part[...]
        return np.ascontiguousarray(values, dtype=np.float32)


def _open(path: Path) -> Any:
    """A safetensors file to read from; Any, since the library types its classes and not their methods."""
    return safe_open(path, framework="numpy")


def _weight_files(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        raise CheckpointError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json: "
            "it must be a folder that save_pretrained wrote"
        )
    files = sorted({folder / file for file in _weight_map(index).values()})
    for file in files:
        if not file.exists():
            raise CheckpointError(f"shard {file} is missing, {index.name} names it: fetch it again")
    return files


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to files")
    return weight_map


def _missing_from_shards(folder: Path, stored: set[str]) -> list[tuple[str, str]]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return []
    return [
        (file, name)
        for name, file in _weight_map(index).items()
        if canonical_name(name) is not None and name not in stored
    ]
