"""Random checkpoints in transformers' own format, and what transformers' own model says about them.

Needs the `oracle` extra. The shapes are awkward on purpose: key and value head sizes and counts differ everywhere, so
that nothing swapped goes unseen.
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from iotd.convert.convert import RECIPES
from iotd.convert.quantize import dequantize, quantize
from iotd.convert.random import special_tokens
from iotd.convert.rounding import EMBEDDING, Nearest
from iotd.convert.tokenizer import byte_tokenizer_json

VOCAB = 307
SPECIAL = special_tokens(VOCAB)
# With larger weights these random networks amplify rounding so much that transformers' own float32 is further than the
# tests' tolerance from its float64.
INITIALIZER_RANGE = 0.05
ROPE = {"rope_type": "default", "rope_theta": 1e7, "mrope_interleaved": True}
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "rope_parameters": ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2]},
    "initializer_range": INITIALIZER_RANGE,
    "max_position_embeddings": 4096,
    "eos_token_id": SPECIAL["<|im_end|>"],
}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "patch_size": 4,
    "num_position_embeddings": 36,
    "initializer_range": INITIALIZER_RANGE,
}

RECIPE = RECIPES["int4"]


@dataclass(frozen=True)
class Shape:
    """One kind of checkpoint."""

    name: str
    seed: int
    tied: bool = True
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] | None = field(default_factory=dict)
    """None makes a text-only checkpoint (Qwen3_5ForCausalLM)."""
    dtype: torch.dtype = torch.float32
    shard: str = "5GB"
    mtp: bool = False


SHAPES = (
    Shape("grouped", 0),
    Shape("untied", 1, tied=False, text={"linear_num_value_heads": 2, "linear_key_head_dim": 24}, dtype=torch.bfloat16),
    Shape(
        "odd", 2, text={"hidden_size": 80, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 72}
    ),
    Shape("sharded", 3, text={"num_hidden_layers": 8, "linear_conv_kernel_dim": 3}, shard="150KB", dtype=torch.float16),
    Shape("wide-vision", 4, vision={"hidden_size": 48, "num_heads": 3, "depth": 3, "patch_size": 6}, mtp=True),
    Shape("text-only", 5, vision=None, text={"linear_num_key_heads": 3, "linear_num_value_heads": 3}),
)
GOLDEN = (
    Shape("grouped", 10, dtype=torch.bfloat16),
    Shape(
        "untied", 11, tied=False, text={"linear_num_value_heads": 2, "linear_key_head_dim": 24}, dtype=torch.bfloat16
    ),
)
"""Kept in tests/golden with what transformers says of them, for tests without torch."""
Network = Qwen3_5ForConditionalGeneration | Qwen3_5ForCausalLM


def make(shape: Shape) -> Network:
    """A model of that shape in float32, its weights rounded to what the checkpoint will hold."""
    torch.manual_seed(shape.seed)
    text = TEXT | shape.text | {"tie_word_embeddings": shape.tied}
    network: Network
    if shape.vision is None:
        network = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**text))
    else:
        vision = VISION | shape.vision | {"out_hidden_size": text["hidden_size"]}
        ids = {"image_token_id": "<|image_pad|>", "vision_start_token_id": "<|vision_start|>"}
        config = Qwen3_5Config(
            text_config=text,
            vision_config=vision,
            tie_word_embeddings=shape.tied,
            **{key: SPECIAL[content] for key, content in ids.items()},
        )
        network = Qwen3_5ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1:  # norms, biases and gates begin as constants, which would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if "conv1d" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
            parameter.copy_(parameter.to(shape.dtype).float())
    return network.eval()


def save(network: Network, shape: Shape, folder: Path) -> None:
    """What `save_pretrained` writes, with a byte-level tokenizer and the image processor's settings."""
    rounded = copy.deepcopy(network).to(shape.dtype)  # a copy: the buffers of rotary frequencies are rounded as well
    rounded.save_pretrained(folder, max_shard_size=shape.shard)
    tokenizer = byte_tokenizer_json(SPECIAL, VOCAB)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if shape.vision is not None:
        image_processor(shape).save_pretrained(folder)
    if shape.mtp:
        _add_mtp(folder)


def _add_mtp(folder: Path) -> None:
    """Weights of multi-token prediction, as published checkpoints have them and transformers ignores them."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.layers.0.self_attn.q_proj.weight"] = torch.zeros(4, 4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def image_processor(shape: Shape) -> Any:
    """transformers' own, for this shape's patches and small images."""
    patch = (VISION | (shape.vision or {}))["patch_size"]
    size = {"shortest_edge": 400, "longest_edge": 3000}
    return Qwen2VLImageProcessorPil(patch_size=patch, size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def reference_logits(network: Network, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits after every token, float32 [T, V]."""
    with torch.no_grad():
        found: NDArray[np.float32] = network(input_ids=torch.tensor(ids)[None]).logits[0].numpy()
    return found


def image_inputs(
    network: Network, shape: Shape, rgb: NDArray[np.uint8], before: list[int], after: list[int]
) -> dict[str, Any]:
    """The model's inputs for an image between two runs of token ids."""
    processed = image_processor(shape)(images=rgb, return_tensors="pt")
    grid = processed["image_grid_thw"]
    n_tokens = int(grid.prod()) // 4
    ids = [*before, *[SPECIAL["<|image_pad|>"]] * n_tokens, *after]
    kinds = [0] * len(before) + [1] * n_tokens + [0] * len(after)
    return {
        "input_ids": torch.tensor([ids]),
        "mm_token_type_ids": torch.tensor([kinds], dtype=torch.int32),
        "pixel_values": processed["pixel_values"],
        "image_grid_thw": grid,
    }


def round_weights(network: Network) -> None:
    """Replace each weight that the int4 recipe rounds by what its codes stand for."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            kept = parameter.ndim != 2 or ".in_proj_a." in name or ".in_proj_b." in name or ".visual." in name
            if not kept:
                untied = name.endswith("embed_tokens.weight") and not network.config.tie_word_embeddings
                grid = Nearest(RECIPE).grid(EMBEDDING if untied else name)
                parameter.copy_(torch.from_numpy(dequantize(quantize(parameter.numpy(), grid.bits, grid.block))))
