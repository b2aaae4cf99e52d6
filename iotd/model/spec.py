"""The dimensions of a network, as its manifest carries them; what a state and a graph are shaped by.

Axis letters, used in every docstring of `iotd.model` and `iotd.convert`:

    T  tokens in one run          V  vocabulary           D  hidden size of the text model
    C  capacity of a state        H  attention heads      G  key/value heads of full attention
    K  DeltaNet key heads         U  DeltaNet value heads     k, v  DeltaNet key and value head sizes
    N  patches of an image        n  tokens of an image (N / merge²)
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

LayerKind = Literal["linear", "full"]
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]


class VisionSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The vision tower and how pixels become its input."""

    depth: Count
    hidden_size: Count
    intermediate_size: Count
    num_heads: Count
    patch_size: Count
    temporal_patch_size: Count
    merge_size: Count
    in_channels: Count
    grid_side: Count
    """Side of the square table of learned positions."""
    rope_theta: float
    activation: str
    min_pixels: Count
    max_pixels: Count
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def size_factor(self) -> int:
        """Both sides of a resized image are multiples of this, in pixels."""
        return self.patch_size * self.merge_size


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The text model; `vision` is None for a text-only package."""

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    layers: tuple[LayerKind, ...]
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    rotary_dim: Count
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_positions: Count
    linear_key_heads: Count
    linear_value_heads: Count
    linear_key_dim: Count
    linear_value_dim: Count
    conv_kernel: Count
    rms_eps: float
    tied: bool
    """The output head shares the embedding's weights."""
    eos_token_ids: tuple[int, ...]
    vision: VisionSpec | None = None

    @property
    def linear_key_size(self) -> int:
        """Width of all DeltaNet keys together, K·k."""
        return self.linear_key_heads * self.linear_key_dim

    @property
    def linear_value_size(self) -> int:
        """Width of all DeltaNet values together, U·v."""
        return self.linear_value_heads * self.linear_value_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution: queries, keys and values side by side."""
        return 2 * self.linear_key_size + self.linear_value_size

    def state_shapes(self, capacity: int, layers: Sequence[int] | None = None) -> dict[str, tuple[int, ...]]:
        """Name and shape of every state tensor, all float32, in graph order. layers: of these alone."""
        shapes: dict[str, tuple[int, ...]] = {}
        for i in range(len(self.layers)) if layers is None else layers:
            if self.layers[i] == "linear":
                shapes[f"conv.{i}"] = (1, self.conv_kernel - 1, self.conv_channels)
                shapes[f"recurrent.{i}"] = (1, self.linear_value_heads, self.linear_key_dim, self.linear_value_dim)
            else:
                shapes[f"key.{i}"] = (1, self.num_kv_heads, capacity, self.head_dim)
                shapes[f"value.{i}"] = (1, self.num_kv_heads, capacity, self.head_dim)
        return shapes
