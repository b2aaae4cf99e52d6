"""Twins of a checkpoint: they compute what it computes, and have the outlier channels of a large model.

A small model has none, which flatters every way of rounding it. A twin's norms stretch some channels and the matrices
behind them take that back; so do pairs of matrices with nothing but products between them. Channels change places, too.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from checkpoints import SINGLE, copy_files
from ml_dtypes import bfloat16  # noqa: F401 - registers the type, without which safetensors cannot read it into numpy
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from iotd.convert.checkpoint import canonical_name, read_json
from iotd.convert.spec import spec_from_config
from iotd.model.spec import ModelSpec

Doubles = NDArray[np.float64]
Tail = Literal["normal", "student"]
STUDENT_FREEDOM = 3
NORM_FED = {
    "input_layernorm": (
        *(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "a", "b")),
        *(f"self_attn.{part}_proj" for part in "qkv"),
    ),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Norms of a layer and the matrices that read them, whichever of these the layer has."""
WRITE_RESIDUAL = (
    *("merger.linear_fc2.weight", "merger.linear_fc2.bias", "text.norm.weight", "layernorm.weight"),
    *(".o_proj.weight", ".out_proj.weight", ".down_proj.weight"),
)
READ_RESIDUAL = (
    *("embed_tokens.weight", "head.weight", *(f".{part}_proj.weight" for part in ("q", "k", "v", "gate", "up"))),
    *(f".in_proj_{part}.weight" for part in ("qkv", "z", "a", "b")),
)
"""How the tensors end whose rows, or columns, are channels of the residual. The embedding's columns are."""


@dataclass(frozen=True, slots=True)
class Severity:
    """How far the sizes of channels lie apart: of their factors' logarithms the distribution, and its spread."""

    sigma: float
    """Standard deviation."""
    tail: Tail = "normal"
    """`student` has a few channels far larger than any that the normal distribution has: t with 3 degrees."""

    def draw(self, random: np.random.Generator, n: int) -> Doubles:
        """Factors of n channels."""
        if self.tail == "normal":
            return np.exp(self.sigma * random.standard_normal(n))
        scale = self.sigma * np.sqrt((STUDENT_FREEDOM - 2) / STUDENT_FREEDOM)
        return np.exp(scale * random.standard_t(STUDENT_FREEDOM, n))


def twin(source: Path, out: Path, severity: Severity, *, seed: int = 0) -> Path:
    """Write the twin of a checkpoint with a single weight file to a new folder, and return that folder. float32."""
    stored = load_file(source / SINGLE)
    names = {canonical: name for name in stored if (canonical := canonical_name(name)) is not None}
    tensors = {canonical: stored[name].astype(np.float64) for canonical, name in names.items()}
    config = read_json(source / "config.json")
    tied = "head.weight" not in tensors
    made = _Twin(tensors, spec_from_config(config, source, tied=tied, vision=False), severity, seed)
    made.stretch()
    made.permute()
    copy_files(source, out, but=SINGLE)
    save_file({names[name]: np.ascontiguousarray(values, np.float32) for name, values in tensors.items()}, out / SINGLE)
    return out


class _Twin:
    """Changes the tensors of a checkpoint, by canonical name, in place."""

    def __init__(self, tensors: dict[str, Doubles], spec: ModelSpec, severity: Severity, seed: int) -> None:
        self.tensors = tensors
        self.spec = spec
        self.severity = severity
        self.random = np.random.default_rng(seed)

    def stretch(self) -> None:
        """Give every channel that is read by a matrix a factor of its own, and take it back in that matrix."""
        for i, kind in enumerate(self.spec.layers):
            at = f"text.layers.{i}."
            for norm, readers in NORM_FED.items():
                self._stretch_norm(at + norm, [at + reader for reader in readers if self._has(at + reader)])
            self._stretch_units(at + "mlp.up_proj", at + "mlp.down_proj")
            if kind == "linear":
                self._stretch_deltanet(at + "linear_attn.")
            else:
                self._stretch_values(at + "self_attn.")
        if "head.weight" in self.tensors:  # a tied head's columns are the residual's, too, which no factor may change
            self._stretch_norm("text.norm", ["head"])

    def _stretch_norm(self, norm: str, readers: list[str]) -> None:
        """These norms are zero-centred: the scale is one plus the weight."""
        factors = self._draw(self.spec.hidden_size)
        self.tensors[f"{norm}.weight"] = (1 + self.tensors[f"{norm}.weight"]) * factors - 1
        for reader in readers:
            self.tensors[f"{reader}.weight"] /= factors

    def _stretch_units(self, rows_of: str, columns_of: str) -> None:
        factors = self._draw(self.spec.intermediate_size)
        self.tensors[f"{rows_of}.weight"] *= factors[:, None]
        self.tensors[f"{columns_of}.weight"] /= factors

    def _stretch_values(self, at: str) -> None:
        """The query heads of a group share their values."""
        factors = self._draw(self.spec.num_kv_heads * self.spec.head_dim).reshape(self.spec.num_kv_heads, -1)
        self.tensors[f"{at}v_proj.weight"] *= factors.reshape(-1, 1)
        groups = self.spec.num_heads // self.spec.num_kv_heads
        self.tensors[f"{at}o_proj.weight"] /= np.repeat(factors, groups, axis=0).reshape(-1)

    def _stretch_deltanet(self, at: str) -> None:
        """What goes into the convolution, which takes each channel by itself, and the norm of each head's output.

        The scale of that norm is its weight, and all heads have the same.
        """
        channels = self._draw(self.spec.conv_channels)
        self.tensors[f"{at}in_proj_qkv.weight"] *= channels[:, None]
        self.tensors[f"{at}conv1d.weight"] /= channels[:, None, None]
        factors = self._draw(self.spec.linear_value_dim)
        self.tensors[f"{at}norm.weight"] *= factors
        self.tensors[f"{at}out_proj.weight"] /= np.tile(factors, self.spec.linear_value_heads)

    def permute(self) -> None:
        """Let channels change places wherever nothing can tell: rotary pairs and heads stay where they are."""
        self._permute_residual()
        for i, kind in enumerate(self.spec.layers):
            at = f"text.layers.{i}."
            units = self.random.permutation(self.spec.intermediate_size)
            self._rows(at + "mlp.gate_proj", units)
            self._rows(at + "mlp.up_proj", units)
            self._columns(at + "mlp.down_proj", units)
            if kind == "linear":
                self._permute_deltanet(at + "linear_attn.")
            else:
                self._permute_values(at + "self_attn.")

    def _permute_residual(self) -> None:
        order = self.random.permutation(self.spec.hidden_size)
        for name, values in self.tensors.items():
            if name.endswith(WRITE_RESIDUAL):
                self.tensors[name] = values[order]
            elif name.endswith(READ_RESIDUAL):
                self.tensors[name] = values[:, order]

    def _permute_values(self, at: str) -> None:
        """Of q_proj, each head's query rows are followed by its gate rows, which gate the values."""
        heads, size = self.spec.num_kv_heads, self.spec.head_dim
        orders = np.stack([self.random.permutation(size) for _ in range(heads)])
        self._rows(f"{at}v_proj", (np.arange(heads)[:, None] * size + orders).reshape(-1))
        orders = np.repeat(orders, self.spec.num_heads // heads, axis=0)
        starts = np.arange(self.spec.num_heads)[:, None]
        self._columns(f"{at}o_proj", (starts * size + orders).reshape(-1))
        queries = np.broadcast_to(np.arange(size), orders.shape)
        self._rows(f"{at}q_proj", (starts * 2 * size + np.hstack([queries, size + orders])).reshape(-1))

    def _permute_deltanet(self, at: str) -> None:
        """The dimensions of values alike in all heads, as they share a norm; those of keys in each head by itself."""
        spec = self.spec
        values = self._in_heads(spec.linear_value_heads, [self.random.permutation(spec.linear_value_dim)])
        orders = [self.random.permutation(spec.linear_key_dim) for _ in range(spec.linear_key_heads)]
        keys = self._in_heads(spec.linear_key_heads, orders)
        channels = np.concatenate([keys, spec.linear_key_size + keys, 2 * spec.linear_key_size + values])
        self._rows(f"{at}in_proj_qkv", channels)
        self._rows(f"{at}conv1d", channels)
        self._rows(f"{at}in_proj_z", values)
        self._rows(f"{at}norm", values[: spec.linear_value_dim])
        self._columns(f"{at}out_proj", values)

    def _in_heads(self, heads: int, orders: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        """Of all heads side by side, the order; of each head its own, or the one of all."""
        starts = np.arange(heads)[:, None] * len(orders[0])
        found: NDArray[np.int64] = (starts + np.stack(orders)).reshape(-1)
        return found

    def _rows(self, name: str, order: NDArray[np.int64]) -> None:
        self.tensors[f"{name}.weight"] = self.tensors[f"{name}.weight"][order]

    def _columns(self, name: str, order: NDArray[np.int64]) -> None:
        self.tensors[f"{name}.weight"] = self.tensors[f"{name}.weight"][:, order]

    def _draw(self, n: int) -> Doubles:
        return self.severity.draw(self.random, n)

    def _has(self, name: str) -> bool:
        return f"{name}.weight" in self.tensors
