"""Weights that compute the same, with no channel that dwarfs the others.

What makes a channel of a matrix's input larger, and the column that reads it smaller, changes nothing in floats. In few
bits it does: weights that share a scale are rounded alike, and kernels give the inputs of a block, or of a whole row,
one scale. So the columns of each matrix are made equally large, and what that takes goes into what makes their inputs:
a norm's scale, or the rows of a matrix where nothing but products lie between the two.
"""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from iotd.convert.weights import Floats, Matrix, Weights, slices
from iotd.model.spec import ModelSpec

SMALLEST = 1e-6
"""Of the largest column: what is smaller is as good as nothing."""
END = ("text.norm.weight", "head.weight")


class Balanced:
    """Weights of which the text model is balanced; the others are as they were."""

    def __init__(self, weights: Weights, spec: ModelSpec) -> None:
        self._weights = weights
        self._spec = spec
        self._columns: dict[str, Floats] = {}
        """By the name of a matrix what its columns are multiplied by."""
        self._makers: dict[str, Floats] = {}
        """By the name of a norm or a matrix what its scale, or its rows, are divided by."""
        self._balanced: set[str] = set()

    def tensor(self, name: str, *shape: int) -> Floats:
        self._balance(name)
        values = self._weights.tensor(name, *shape)
        if name in self._makers:
            # Norms are zero-centred, their scale is one plus the weight, but for that of DeltaNet's output.
            offset = 0 if name.endswith("linear_attn.norm.weight") else 1
            return (offset + values) / self._makers[name] - offset
        return values * self._columns[name] if name in self._columns else values

    def matrix(self, name: str, rows: int, columns: int, *, again: bool = False) -> Matrix:
        self._balance(name)
        return self._factored(name, self._weights.matrix(name, rows, columns, again=again))

    def _factored(self, name: str, matrix: Matrix) -> Matrix:
        if name not in self._columns and name not in self._makers:
            return matrix
        wide = self._columns.get(name, np.ones(matrix.columns, np.float32))
        high = self._makers.get(name, np.ones(matrix.rows, np.float32))
        read = lambda start, stop: matrix.read(start, stop) * wide / high[start:stop, None]  # noqa: E731
        return Matrix(matrix.rows, matrix.columns, read)

    def _balance(self, name: str) -> None:
        """Find the factors of the part of the model that a tensor is of, unless they are known."""
        spec = self._spec
        if name.startswith("text.layers."):
            part = ".".join(name.split(".")[:3])
        elif name in END and not spec.tied:  # a tied head's columns are the embedding's, too
            part = "text.norm"
        else:
            return
        if part in self._balanced:
            return
        self._balanced.add(part)
        if part == "text.norm":
            self._pair(part, {"head": spec.vocab_size}, spec.hidden_size)
        else:
            self._balance_layer(part, spec.layers[int(part.rpartition(".")[2])] == "full")

    def _balance_layer(self, at: str, full: bool) -> None:
        """What is made of rows first, as those are columns' parts, too."""
        spec, attn = self._spec, f"{at}.self_attn" if full else f"{at}.linear_attn"
        self._pair(f"{at}.mlp.up_proj", {f"{at}.mlp.down_proj": spec.hidden_size}, spec.intermediate_size)
        rows = {f"{at}.mlp.{part}_proj": spec.intermediate_size for part in ("gate", "up")}
        self._pair(f"{at}.post_attention_layernorm", rows, spec.hidden_size)
        if full:
            width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
            heads = (spec.head_dim, spec.num_kv_heads, spec.num_heads // spec.num_kv_heads)
            self._pair(f"{attn}.v_proj", {f"{attn}.o_proj": spec.hidden_size}, *heads)
            rows = {f"{attn}.q_proj": 2 * width, f"{attn}.k_proj": kv_width, f"{attn}.v_proj": kv_width}
            self._pair(f"{at}.input_layernorm", rows, spec.hidden_size)
        else:
            heads = (spec.linear_value_dim, 1, spec.linear_value_heads)
            self._pair(f"{attn}.norm", {f"{attn}.out_proj": spec.hidden_size}, *heads)
            rows = {f"{attn}.in_proj_qkv": spec.conv_channels, f"{attn}.in_proj_z": spec.linear_value_size}
            self._pair(f"{at}.input_layernorm", rows, spec.hidden_size)
            for part in "ab":  # narrow, and in float32
                self._columns[f"{attn}.in_proj_{part}.weight"] = self._columns[f"{attn}.in_proj_z.weight"]

    def _pair(self, maker: str, readers: dict[str, int], size: int, groups: int = 1, repeats: int = 1) -> None:
        """Balance the readers of one input, each with its rows. The other sizes are as `factors` takes them."""
        channels = groups, repeats, size
        matrices = [self._read(f"{reader}.weight", rows, math.prod(channels)) for reader, rows in readers.items()]
        self._makers[f"{maker}.weight"], columns = factors(matrices, channels)
        self._columns |= {f"{reader}.weight": columns for reader in readers}

    def _read(self, name: str, rows: int, columns: int) -> Matrix:
        return self._factored(name, self._weights.matrix(name, rows, columns, again=True))


def factors(readers: Iterable[Matrix], channels: tuple[int, int, int]) -> tuple[Floats, Floats]:
    """What to divide the channels of an input by, and multiply the columns by that read it: both float32.

    readers: all matrices that are multiplied by the input. channels: groups, how often the input repeats each group,
    channels of a group; the first factors are [groups · channels], the second [groups · repeats · channels].
    """
    squares: NDArray[np.float64] = sum((_squares(matrix) for matrix in readers), np.zeros(math.prod(channels)))
    groups, repeats, size = channels
    sizes = np.sqrt(squares.reshape(groups, repeats, size).sum(axis=1))
    sizes = np.maximum(sizes, max(SMALLEST * sizes.max(), np.finfo(np.float32).tiny))
    found = (np.exp(np.log(sizes).mean()) / sizes).astype(np.float32)
    return found.reshape(-1), np.repeat(found[:, None], repeats, axis=1).reshape(-1)


def _squares(matrix: Matrix) -> NDArray[np.float64]:
    """Of each column the sum."""
    parts = (matrix.read(start, stop) for start, stop in slices(matrix))
    return sum((np.square(part, dtype=np.float64).sum(axis=0) for part in parts), np.zeros(matrix.columns))
