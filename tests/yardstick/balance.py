"""Tensors of a GGUF file, balanced as conversion balances those of a checkpoint. Knows no graph."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from iotd.convert.balance import factors
from iotd.convert.weights import Matrix
from yardstick.stacks import Tensors

Floats = NDArray[np.float32]


class Balanced:
    """The layers' norms and matrices, in whole matrices: these models are small."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._columns: dict[str, Floats] = {}
        self._makers: dict[str, Floats] = {}
        kind = tensors.field("general.architecture")
        heads, kv_heads = (tensors.field(f"{kind}.attention.head_count{part}") for part in ("", "_kv"))
        for i in range(tensors.field(f"{kind}.block_count")):
            self._balance(f"blk.{i}", heads, kv_heads)

    def field(self, name: str) -> Any:
        return self._tensors.field(name)

    def vector(self, name: str) -> Floats:
        return self._tensors.vector(name) / self._makers.get(name, np.float32(1))

    def matrix(self, name: str) -> Matrix:
        matrix = self._tensors.matrix(name)
        if name not in self._columns and name not in self._makers:
            return matrix
        wide, high = self._columns.get(name, np.float32(1)), self._makers.get(name, np.ones(matrix.rows, np.float32))
        return Matrix.of(matrix.read(0, matrix.rows) * wide / high[:, None])

    def _balance(self, at: str, heads: int, kv_heads: int) -> None:
        self._pair(f"{at}.ffn_up", f"{at}.ffn_down")
        self._pair(f"{at}.ffn_norm", f"{at}.ffn_gate", f"{at}.ffn_up")
        self._pair(f"{at}.attn_v", f"{at}.attn_output", groups=kv_heads, repeats=heads // kv_heads)
        self._pair(f"{at}.attn_norm", *(f"{at}.attn_{part}" for part in "qkv"))

    def _pair(self, maker: str, *readers: str, groups: int = 1, repeats: int = 1) -> None:
        matrices = [self.matrix(f"{reader}.weight") for reader in readers]
        size = matrices[0].columns // groups // repeats
        self._makers[f"{maker}.weight"], columns = factors(matrices, (groups, repeats, size))
        self._columns |= {f"{reader}.weight": columns for reader in readers}
