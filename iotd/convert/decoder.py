"""The text model up to its last norm as one graph of onnxruntime's fused operators; `convert.head` goes on from there.

The layer's formulas are those of transformers' `models/qwen3_5/modeling_qwen3_5.py`; operator semantics are those of
onnxruntime's contrib operator documentation. Past and present state are separate names here and the same memory at run
time. Hidden states are given only for the rows named in `hidden_rows`, which may be none.
"""

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from iotd.convert.graph import MS, GraphWriter
from iotd.convert.weights import Matrix, Weights
from iotd.model.spec import ModelSpec

FLOAT = TensorProto.FLOAT
END = np.iinfo(np.int64).max
L2_EPSILON = 1e-6  # of the reference's l2norm, under the square root beside the sum of squares


class DecoderWriter:
    """Builds the decoder of one spec into a GraphWriter."""

    def __init__(self, graph: GraphWriter, spec: ModelSpec, weights: Weights) -> None:
        self.graph = graph
        self.spec = spec
        self.weights = weights

    def write(self) -> None:
        """Write the whole decoder."""
        graph, spec = self.graph, self.spec
        graph.input("inputs_embeds", FLOAT, (1, "T", spec.hidden_size))
        graph.input("hidden_rows", TensorProto.INT64, ("R",))
        graph.output("hidden", FLOAT, (1, "R", spec.hidden_size))
        self._declare(range(len(spec.layers)))
        residual = "inputs_embeds"
        normed = self._normalise(residual, "text.layers.0.input_layernorm")
        for i in range(len(spec.layers)):
            mixed, residual = self._layer(i, normed, residual)
            if i + 1 < len(spec.layers):
                normed, residual = self._add_and_norm(mixed, residual, f"text.layers.{i + 1}.input_layernorm")
        mixed, residual = (graph.op("Gather", x, "hidden_rows", axis=1) for x in (mixed, residual))
        self._normalise(graph.op("Add", mixed, residual), "text.norm", out="hidden")

    def write_layer(self, i: int) -> None:
        """Write one layer alone: `residual`, float32 [1, T, D], to `residual_out`."""
        self._declare_residual("residual", "residual_out")
        self._declare([i])
        mixed, residual = self._layer(i, self._normalise("residual", f"text.layers.{i}.input_layernorm"), "residual")
        self.graph.op("Add", mixed, residual, out="residual_out")

    def write_end(self) -> None:
        """Write the last norm alone: `residual`, float32 [1, T, D], to `hidden`."""
        self._declare_residual("residual", "hidden")
        self._normalise("residual", "text.norm", out="hidden")

    def _declare_residual(self, before: str, after: str) -> None:
        shape = (1, "T", self.spec.hidden_size)
        self.graph.input(before, FLOAT, shape)
        self.graph.output(after, FLOAT, shape)

    def _declare(self, layers: Sequence[int]) -> None:
        """What layers take and give beside the residual stream."""
        graph, spec = self.graph, self.spec
        if any(spec.layers[i] == "full" for i in layers):
            graph.input("position_ids", TensorProto.INT64, (3, 1, "T"))
            graph.input("last_position", TensorProto.INT32, (1,))
            graph.input("total_positions", TensorProto.INT32, (1,))
            graph.input("cos_table", FLOAT, ("P", spec.rotary_dim // 2))
            graph.input("sin_table", FLOAT, ("P", spec.rotary_dim // 2))
        for name, shape in spec.state_shapes(0, layers).items():
            dims = tuple(side or "C" for side in shape)
            graph.input(f"past.{name}", FLOAT, dims)
            graph.output(f"present.{name}", FLOAT, dims)

    def _layer(self, i: int, x: str, residual: str) -> tuple[str, str]:
        """Of the normalised input what is to be added to the residual stream behind the layer, and that stream."""
        mixed = self._deltanet(i, x) if self.spec.layers[i] == "linear" else self._attention(i, x)
        normed, residual = self._add_and_norm(mixed, residual, f"text.layers.{i}.post_attention_layernorm")
        return self._mlp(i, normed), residual

    def _deltanet(self, i: int, x: str) -> str:
        """Gated DeltaNet: convolved queries, keys and values drive the gated delta rule; the output is gated by z."""
        graph, spec, at = self.graph, self.spec, f"text.layers.{i}.linear_attn"
        keys, values = spec.linear_key_size, spec.linear_value_size
        mixed = self._linear(x, f"{at}.in_proj_qkv", spec.conv_channels, spec.hidden_size)
        z = self._linear(x, f"{at}.in_proj_z", values, spec.hidden_size)
        decay, beta = self._decay_and_beta(at, x)
        convolved = self._convolve(i, mixed)
        sizes = self._ints(2 * keys, values)
        both, value = graph.ops("Split", convolved, sizes, outs=(f"{at}.qk", f"{at}.v"), axis=2)
        query, key = self._unit_queries_and_keys(at, both)
        attended, _ = graph.ops(
            "LinearAttention",
            query,
            key,
            value,
            f"past.recurrent.{i}",
            decay,
            beta,
            outs=(f"{at}.attended", f"present.recurrent.{i}"),
            domain=MS,
            update_rule="gated_delta",
            q_num_heads=spec.linear_value_heads,
            kv_num_heads=spec.linear_value_heads,
        )
        # GatedRMSNorm does this in one operator, which takes six to nine times as long (on AVX2, 1 to 128 tokens).
        scale = graph.constant(f"{at}.norm", self.weights.tensor(f"{at}.norm.weight", spec.linear_value_dim))
        normed = self._norm_heads(attended, scale, spec.linear_value_heads, spec.linear_value_dim)
        gated = graph.op("Mul", normed, self._silu(z))
        return self._linear(gated, f"{at}.out_proj", spec.hidden_size, values)

    def _convolve(self, i: int, x: str) -> str:
        """A causal convolution of each channel over its last values, as a sum of products; then SiLU.

        CausalConvWithState does this in one operator, which takes up to four times as long (on AVX2, 1 to 128 tokens).
        """
        graph, spec, at = self.graph, self.spec, f"text.layers.{i}.linear_attn"
        weight = self.weights.tensor(f"{at}.conv1d.weight", spec.conv_channels, 1, spec.conv_kernel)
        kept = spec.conv_kernel - 1
        time, end = self._ints(1), self._ints(END)
        rows = graph.op("Concat", f"past.conv.{i}", x, axis=1)
        total = ""
        for k in range(spec.conv_kernel):
            seen = graph.op("Slice", rows, self._ints(k), self._ints(k - kept) if k < kept else end, time)
            product = graph.op("Mul", seen, graph.constant(f"{at}.conv.{k}", np.ascontiguousarray(weight[:, 0, k])))
            total = graph.op("Add", total, product) if total else product
        graph.op("Slice", rows, self._ints(-kept), end, time, out=f"present.conv.{i}")
        return self._silu(total)

    def _decay_and_beta(self, at: str, x: str) -> tuple[str, str]:
        """decay = −exp(A_log)·softplus(a + dt_bias) and beta = sigmoid(b), one of each for a value head; float32."""
        graph, spec, heads = self.graph, self.spec, self.spec.linear_value_heads
        a, b = (
            graph.op("MatMul", x, graph.constant(f"{at}.{part}", np.ascontiguousarray(weight.T)))
            for part in ("in_proj_a", "in_proj_b")
            for weight in [self.weights.tensor(f"{at}.{part}.weight", heads, spec.hidden_size)]
        )
        bias = graph.constant(f"{at}.dt_bias", self.weights.tensor(f"{at}.dt_bias", heads))
        scale = graph.constant(f"{at}.decay_scale", -np.exp(self.weights.tensor(f"{at}.A_log", heads)))
        decay, beta = graph.ops("LinearAttentionGate", a, bias, scale, b, outs=(f"{at}.decay", f"{at}.beta"), domain=MS)
        return decay, beta

    def _unit_queries_and_keys(self, at: str, both: str) -> tuple[str, str]:
        """L2-normalise queries and keys side by side, and repeat each head for the value heads that share it.

        x / sqrt(Σx² + ε) is RMS normalisation with ε/k under the root and 1/sqrt(k) as its scale.
        """
        graph, spec = self.graph, self.spec
        heads, size = spec.linear_key_heads, spec.linear_key_dim
        groups = spec.linear_value_heads // heads
        scale = graph.constant("unit_scale", np.full(size, size**-0.5, np.float32))
        split = graph.op("Reshape", both, self._ints(1, -1, 2 * heads, size))
        unit = graph.op("SimplifiedLayerNormalization", split, scale, axis=-1, epsilon=L2_EPSILON / size)
        if groups > 1:
            unit = graph.op("Unsqueeze", unit, self._ints(3))
            unit = graph.op("Expand", unit, self._ints(1, 1, 1, groups, 1))
        packed = graph.op("Reshape", unit, self._ints(1, -1, 2 * heads * groups * size))
        query, key = graph.ops("Split", packed, outs=(f"{at}.q", f"{at}.k"), axis=2, num_outputs=2)
        return query, key

    def _attention(self, i: int, x: str) -> str:
        """Grouped-query attention: normalised queries and keys, partial M-RoPE, and a sigmoid gate on its output."""
        graph, spec, at = self.graph, self.spec, f"text.layers.{i}.self_attn"
        width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        query_weight, gate_weight = self._query_and_gate(at)
        query = self._rotate(at, "q_norm", graph.linear(x, f"{at}.q_proj", query_weight), spec.num_heads)
        key = self._linear(x, f"{at}.k_proj", kv_width, spec.hidden_size)
        key = self._rotate(at, "k_norm", key, spec.num_kv_heads)
        value = self._linear(x, f"{at}.v_proj", kv_width, spec.hidden_size)
        attended, _, _ = graph.ops(
            "GroupQueryAttention",
            query,
            key,
            value,
            f"past.key.{i}",
            f"past.value.{i}",
            "last_position",
            "total_positions",
            outs=(f"{at}.attended", f"present.key.{i}", f"present.value.{i}"),
            domain=MS,
            num_heads=spec.num_heads,
            kv_num_heads=spec.num_kv_heads,
        )
        gate = graph.op("Sigmoid", graph.linear(x, f"{at}.gate_proj", gate_weight))
        return self._linear(graph.op("Mul", attended, gate), f"{at}.o_proj", spec.hidden_size, width)

    def _query_and_gate(self, at: str) -> tuple[Matrix, Matrix]:
        """q_proj holds each head's query rows followed by its gate rows; take them apart."""
        spec = self.spec
        shape = (spec.num_heads, 2, spec.head_dim, spec.hidden_size)
        both = self.weights.tensor(f"{at}.q_proj.weight", shape[0] * 2 * shape[2], shape[3]).reshape(shape)
        query, gate = (Matrix.of(np.ascontiguousarray(both[:, k]).reshape(-1, spec.hidden_size)) for k in (0, 1))
        return query, gate

    def _rotate(self, at: str, norm: str, x: str, heads: int) -> str:
        graph, spec = self.graph, self.spec
        return graph.op(
            "MRotaryEmbedding",
            self._norm_heads(x, self._norm(f"{at}.{norm}", spec.head_dim), heads, spec.head_dim),
            "position_ids",
            "cos_table",
            "sin_table",
            domain=MS,
            num_heads=heads,
            rotary_embedding_dim=spec.rotary_dim,
            mrope_section=list(spec.mrope_section),
            mrope_layout=1,
        )

    def _mlp(self, i: int, x: str) -> str:
        """SwiGLU."""
        graph, spec, at = self.graph, self.spec, f"text.layers.{i}.mlp"
        gate = self._linear(x, f"{at}.gate_proj", spec.intermediate_size, spec.hidden_size)
        up = self._linear(x, f"{at}.up_proj", spec.intermediate_size, spec.hidden_size)
        hidden = graph.op("Mul", self._silu(gate), up)
        return self._linear(hidden, f"{at}.down_proj", spec.hidden_size, spec.intermediate_size)

    def _add_and_norm(self, x: str, residual: str, norm: str) -> tuple[str, str]:
        normed, _, _, total = self.graph.ops(
            "SkipSimplifiedLayerNormalization",
            x,
            residual,
            self._norm(norm),
            outs=(f"{norm}.normed", "", "", f"{norm}.sum"),
            domain=MS,
            epsilon=self.spec.rms_eps,
        )
        return normed, total

    def _normalise(self, x: str, norm: str, out: str = "") -> str:
        scale = self._norm(norm)
        return self.graph.op("SimplifiedLayerNormalization", x, scale, out=out, axis=-1, epsilon=self.spec.rms_eps)

    def _norm_heads(self, x: str, scale: str, heads: int, size: int) -> str:
        """RMS norm of each head by itself, [1, T, heads · size]."""
        graph = self.graph
        x = graph.op("Reshape", x, self._ints(1, -1, heads, size))
        x = graph.op("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=self.spec.rms_eps)
        return graph.op("Reshape", x, self._ints(1, -1, heads * size))

    def _ints(self, *values: int) -> str:
        """A constant, int64 [n]."""
        return self.graph.constant(f"ints.{'.'.join(map(str, values))}", np.array(values, np.int64))

    def _silu(self, x: str) -> str:
        """x·sigmoid(x); QuickGelu with alpha 1 is that in one operator."""
        return self.graph.op("QuickGelu", x, domain=MS, alpha=1.0)

    def _linear(self, x: str, name: str, rows: int, columns: int) -> str:
        return self.graph.linear(x, name, self.weights.matrix(f"{name}.weight", rows, columns))

    def _norm(self, name: str, size: int = 0) -> str:
        """The scale of a zero-centred RMS norm: one plus its weight."""
        return self.graph.constant(name, 1 + self.weights.tensor(f"{name}.weight", size or self.spec.hidden_size))
