"""Layers of Llama and Gemma 3 as graphs, which conversion's own writer stores and rounds.

The formulas are those of transformers' `models/llama/modeling_llama.py` and `models/gemma3/modeling_gemma3.py`. Tensors
are named and stored as in llama.cpp's GGUF files: Llama's rotary halves are interleaved there, Gemma's norms have their
one added. One sequence at a time, from its beginning. Knows no recipe.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from iotd.convert.graph import MS, GraphWriter
from iotd.convert.rounding import HEAD
from iotd.convert.weights import Matrix

Floats = NDArray[np.float32]
FLOAT, INT32 = TensorProto.FLOAT, TensorProto.INT32


class Tensors(Protocol):
    """What a GGUF file holds."""

    def field(self, name: str) -> Any:
        """A value of the metadata; None where it is not there."""
        ...

    def vector(self, name: str) -> Floats: ...

    def matrix(self, name: str) -> Matrix: ...


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a stack."""

    n_layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    rope_base: float
    window: int = 0
    """Tokens that a local layer sees; 0 where there are no local layers."""
    global_every: int = 6
    """Of so many layers the last one sees all tokens, where there are local layers."""
    local_rope_base: float = 10_000.0

    def local(self, i: int) -> bool:
        return bool(self.window) and (i + 1) % self.global_every != 0


Stored = Callable[[str, Matrix], Matrix]
"""A matrix, by its name, as it is to be stored."""


def open_stack(tensors: Tensors, stored: Stored = lambda _, weight: weight) -> "LlamaStack":
    """The stack that a GGUF file describes."""
    kind = tensors.field("general.architecture")
    heads, width = tensors.field(f"{kind}.attention.head_count"), tensors.field(f"{kind}.embedding_length")
    shape = Shape(
        n_layers=tensors.field(f"{kind}.block_count"),
        hidden_size=width,
        heads=heads,
        kv_heads=tensors.field(f"{kind}.attention.head_count_kv"),
        head_dim=tensors.field(f"{kind}.attention.key_length") or width // heads,
        eps=tensors.field(f"{kind}.attention.layer_norm_rms_epsilon"),
        rope_base=tensors.field(f"{kind}.rope.freq_base"),
        window=tensors.field(f"{kind}.attention.sliding_window") or 0,
    )
    return {"llama": LlamaStack, "gemma3": GemmaStack}[kind](tensors, shape, stored)


class LlamaStack:
    """Norm, attention, norm, SwiGLU. The head is the embedding table."""

    def __init__(self, tensors: Tensors, shape: Shape, stored: Stored) -> None:
        self._tensors = tensors
        self.shape = shape
        self.n_layers = shape.n_layers
        self.hidden_size = shape.hidden_size
        self._stored = stored

    def embedding(self) -> Matrix:
        """float32 [V, D]."""
        return self._stored(HEAD, self._tensors.matrix("token_embd.weight"))

    def head(self) -> None:
        """No head of its own."""

    def write_layer(self, graph: GraphWriter, i: int) -> None:
        """Layer i: "residual" float32 [1, T, D] to "residual_out" [1, T, D]."""
        self._declare(graph)
        residual = "residual"
        attended = self._attention(graph, i, self._norm(graph, residual, f"blk.{i}.attn_norm"))
        residual = graph.op("Add", residual, attended)
        mixed = self._mlp(graph, i, self._norm(graph, residual, f"blk.{i}.ffn_norm"))
        graph.op("Add", residual, mixed, out="residual_out")

    def write_end(self, graph: GraphWriter) -> None:
        """The last norm: "residual" to "hidden", both float32 [1, T, D]."""
        graph.input("residual", FLOAT, (1, "T", self.hidden_size))
        graph.output("hidden", FLOAT, (1, "T", self.hidden_size))
        self._norm(graph, "residual", "output_norm", out="hidden")

    def feeds(self, i: int, length: int) -> dict[str, NDArray[Any]]:
        """What the graph of layer i takes beside "residual", for a sequence of `length`."""
        shape = self.shape
        base = shape.local_rope_base if shape.local(i) else shape.rope_base
        frequencies = base ** (-np.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = np.arange(length)[:, None] * frequencies
        return {
            "last_position": np.array([length - 1], np.int32),
            "total_positions": np.array([length], np.int32),
            "cos_table": np.cos(angles).astype(np.float32),
            "sin_table": np.sin(angles).astype(np.float32),
        }

    def _declare(self, graph: GraphWriter) -> None:
        graph.input("residual", FLOAT, (1, "T", self.hidden_size))
        graph.input("last_position", INT32, (1,))
        graph.input("total_positions", INT32, (1,))
        for name in ("cos_table", "sin_table"):
            graph.input(name, FLOAT, ("T", self.shape.head_dim // 2))
        graph.output("residual_out", FLOAT, (1, "T", self.hidden_size))

    def _attention(self, graph: GraphWriter, i: int, x: str) -> str:
        shape, at = self.shape, f"text.layers.{i}.self_attn"
        query, key = self._query_and_key(graph, i, x)
        value = self._linear(graph, x, f"{at}.v_proj", self._tensors.matrix(f"blk.{i}.attn_v.weight"))
        attended, _, _ = graph.ops(
            "GroupQueryAttention",
            query,
            key,
            value,
            "",
            "",
            "last_position",
            "total_positions",
            "cos_table",
            "sin_table",
            outs=(f"{at}.attended", f"{at}.keys", f"{at}.values"),
            domain=MS,
            num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            do_rotary=1,
            local_window_size=shape.window if shape.local(i) else -1,
        )
        return self._linear(graph, attended, f"{at}.o_proj", self._tensors.matrix(f"blk.{i}.attn_output.weight"))

    def _query_and_key(self, graph: GraphWriter, i: int, x: str) -> tuple[str, str]:
        at = f"text.layers.{i}.self_attn"
        query = self._halves(f"blk.{i}.attn_q.weight", self.shape.heads)
        key = self._halves(f"blk.{i}.attn_k.weight", self.shape.kv_heads)
        return self._linear(graph, x, f"{at}.q_proj", query), self._linear(graph, x, f"{at}.k_proj", key)

    def _halves(self, name: str, heads: int) -> Matrix:
        """A matrix whose rows are pairs of a rotation, with the rows of a head as its two halves."""
        stored = self._tensors.matrix(name)
        pairs = stored.read(0, stored.rows).reshape(heads, self.shape.head_dim // 2, 2, stored.columns)
        return Matrix.of(np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(stored.rows, stored.columns))

    def _mlp(self, graph: GraphWriter, i: int, x: str) -> str:
        at = f"text.layers.{i}.mlp"
        gate, up, down = (self._tensors.matrix(f"blk.{i}.ffn_{part}.weight") for part in ("gate", "up", "down"))
        gated = self._activation(graph, self._linear(graph, x, f"{at}.gate_proj", gate))
        product = graph.op("Mul", gated, self._linear(graph, x, f"{at}.up_proj", up))
        return self._linear(graph, product, f"{at}.down_proj", down)

    def _activation(self, graph: GraphWriter, x: str) -> str:
        return graph.op("QuickGelu", x, domain=MS, alpha=1.0)

    def _linear(self, graph: GraphWriter, x: str, name: str, weight: Matrix) -> str:
        return graph.linear(x, name, self._stored(name, weight))

    def _norm(self, graph: GraphWriter, x: str, name: str, out: str = "") -> str:
        scale = graph.constant(name, self._tensors.vector(f"{name}.weight"))
        return graph.op("SimplifiedLayerNormalization", x, scale, out=out, axis=-1, epsilon=self.shape.eps)


class GemmaStack(LlamaStack):
    """Llama's stack with norms on queries, keys and outputs, most layers local, and the embedding times √D."""

    def write_layer(self, graph: GraphWriter, i: int) -> None:
        self._declare(graph)
        residual = "residual"
        if i == 0:
            factor = graph.constant("embedding_factor", np.array(self.hidden_size**0.5, np.float32))
            residual = graph.op("Mul", residual, factor)
        attended = self._attention(graph, i, self._norm(graph, residual, f"blk.{i}.attn_norm"))
        residual = graph.op("Add", residual, self._norm(graph, attended, f"blk.{i}.post_attention_norm"))
        mixed = self._mlp(graph, i, self._norm(graph, residual, f"blk.{i}.ffn_norm"))
        graph.op("Add", residual, self._norm(graph, mixed, f"blk.{i}.post_ffw_norm"), out="residual_out")

    def _query_and_key(self, graph: GraphWriter, i: int, x: str) -> tuple[str, str]:
        query, key = (
            self._norm_heads(graph, self._linear(graph, x, f"text.layers.{i}.self_attn.{part}_proj", weight), norm)
            for part in ("q", "k")
            for weight in [self._tensors.matrix(f"blk.{i}.attn_{part}.weight")]
            for norm in [f"blk.{i}.attn_{part}_norm"]
        )
        return query, key

    def _norm_heads(self, graph: GraphWriter, x: str, name: str) -> str:
        """RMS norm of each head by itself, [1, T, heads · size]."""
        apart, together = (
            graph.constant(f"shape.{'.'.join(map(str, shape))}", np.array(shape, np.int64))
            for shape in ((1, 0, -1, self.shape.head_dim), (1, 0, -1))
        )
        return graph.op("Reshape", self._norm(graph, graph.op("Reshape", x, apart), name), together)

    def _activation(self, graph: GraphWriter, x: str) -> str:
        return graph.op("Gelu", x, approximate="tanh")
