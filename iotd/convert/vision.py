"""The vision tower as one graph: patches of one image in, embeddings for the text model out.

Formulas are those of transformers' `Qwen3_5VisionModel`. A still image fills both frames of a temporal patch with the
same pixels, so the two halves of the patch projection are added up once, here.
"""

import numpy as np
from onnx import TensorProto

from iotd.convert.graph import MS, GraphWriter
from iotd.convert.weights import Matrix, Weights
from iotd.errors import CheckpointError
from iotd.model.spec import VisionSpec

FLOAT = TensorProto.FLOAT
LAYER_NORM_EPSILON = 1e-6  # fixed in the reference, not in config.json
ACTIVATIONS = {"gelu_pytorch_tanh": "tanh", "gelu": "none"}


class VisionWriter:
    """Builds the vision tower of one spec into a GraphWriter."""

    def __init__(self, graph: GraphWriter, spec: VisionSpec, out_size: int, weights: Weights) -> None:
        if spec.activation not in ACTIVATIONS:
            raise CheckpointError(f"vision_config has hidden_act {spec.activation!r}: known are {sorted(ACTIVATIONS)}")
        self.graph = graph
        self.spec = spec
        self.out_size = out_size
        self.weights = weights

    def write(self) -> None:
        graph, spec = self.graph, self.spec
        self._declare()
        x = graph.op("Add", self._embed_patches(), self._embed_positions())
        x = graph.op("Unsqueeze", x, graph.constant("axis.0", np.array([0], np.int64)))
        for i in range(spec.depth):
            at = f"vision.blocks.{i}"
            x = graph.op("Add", x, self._attention(f"{at}.attn", self._layer_norm(x, f"{at}.norm1")))
            x = graph.op("Add", x, self._mlp(f"{at}.mlp", self._layer_norm(x, f"{at}.norm2")))
        self._merge(x)

    def _declare(self) -> None:
        graph, spec = self.graph, self.spec
        graph.input("patches", FLOAT, ("N", spec.in_channels * spec.patch_size**2))
        graph.input("position_rows", TensorProto.INT64, ("N", 4))
        graph.input("position_weights", FLOAT, ("N", 4, 1))
        graph.input("cos_table", FLOAT, ("N", spec.head_dim // 2))
        graph.input("sin_table", FLOAT, ("N", spec.head_dim // 2))
        graph.output("embeddings", FLOAT, ("n", self.out_size))

    def _embed_patches(self) -> str:
        spec, size = self.spec, self.spec.patch_size
        shape = (spec.hidden_size, spec.in_channels, spec.temporal_patch_size, size, size)
        kernel = self.weights.tensor("vision.patch_embed.proj.weight", *shape).sum(axis=2).reshape(spec.hidden_size, -1)
        bias = self.weights.tensor("vision.patch_embed.proj.bias", spec.hidden_size)
        return self.graph.linear("patches", "vision.patch_embed", Matrix.of(kernel), bias=bias)

    def _embed_positions(self) -> str:
        """Bilinear interpolation in the square table of learned positions: four rows and their weights for a patch."""
        graph, spec = self.graph, self.spec
        table = self.weights.tensor("vision.pos_embed.weight", spec.grid_side**2, spec.hidden_size)
        corners = graph.op("Gather", graph.constant("vision.positions", table), "position_rows", axis=0)
        weighted = graph.op("Mul", corners, "position_weights")
        return graph.op("ReduceSum", weighted, graph.constant("axis.1", np.array([1], np.int64)), keepdims=0)

    def _attention(self, at: str, x: str) -> str:
        graph, spec, size = self.graph, self.spec, self.spec.hidden_size
        packed = self._linear(x, f"{at}.qkv", 3 * size, size)
        query, key, value = graph.ops("Split", packed, outs=(f"{at}.q", f"{at}.k", f"{at}.v"), axis=2, num_outputs=3)
        start = graph.constant("position.0", np.array([0], np.int64))
        query, key = (
            graph.op("RotaryEmbedding", x, start, "cos_table", "sin_table", domain=MS, num_heads=spec.num_heads)
            for x in (query, key)
        )
        attended = graph.op("MultiHeadAttention", query, key, value, domain=MS, num_heads=spec.num_heads)
        return self._linear(attended, f"{at}.proj", size, size)

    def _mlp(self, at: str, x: str) -> str:
        spec = self.spec
        hidden = self._linear(x, f"{at}.linear_fc1", spec.intermediate_size, spec.hidden_size)
        hidden = self.graph.op("Gelu", hidden, approximate=ACTIVATIONS[spec.activation])
        return self._linear(hidden, f"{at}.linear_fc2", spec.hidden_size, spec.intermediate_size)

    def _merge(self, x: str) -> None:
        """Join each merge² neighbouring patches, which lie next to each other, into one token."""
        graph, width = self.graph, self.spec.hidden_size * self.spec.merge_size**2
        x = self._layer_norm(x, "vision.merger.norm")
        x = graph.op("Reshape", x, graph.constant("shape.merged", np.array([-1, width], np.int64)))
        x = graph.op("Gelu", self._linear(x, "vision.merger.linear_fc1", width, width), approximate="none")
        self._linear(x, "vision.merger.linear_fc2", self.out_size, width, out="embeddings")

    def _layer_norm(self, x: str, name: str) -> str:
        graph, size = self.graph, self.spec.hidden_size
        scale = graph.constant(f"{name}.scale", self.weights.tensor(f"{name}.weight", size))
        bias = graph.constant(f"{name}.bias", self.weights.tensor(f"{name}.bias", size))
        return graph.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=LAYER_NORM_EPSILON)

    def _linear(self, x: str, name: str, rows: int, columns: int, out: str = "") -> str:
        weight = self.weights.matrix(f"{name}.weight", rows, columns)
        return self.graph.linear(x, name, weight, bias=self.weights.tensor(f"{name}.bias", rows), out=out)
