"""Random weights of a known shape: for measuring speed and memory where the real ones are not at hand."""

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iotd.convert.tokenizer import byte_tokenizer_json
from iotd.convert.weights import Matrix, Progress

Floats = NDArray[np.float32]
TILE = 1 << 20
ONE_CENTRED = ("linear_attn.norm.weight", "dt_bias", "norm1.weight", "norm2.weight", "merger.norm.weight")

# Read off config.json of the published checkpoints; see also `Qwen3_5Config` of transformers.
_TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "vocab_size": 248320,
    "num_hidden_layers": 24,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
    },
}
_VISION: dict[str, Any] = {
    "hidden_act": "gelu_pytorch_tanh",
    "in_channels": 3,
    "num_position_embeddings": 2304,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_LARGE: dict[str, Any] = {
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "linear_num_value_heads": 32,
}
_SIZES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "0.8b": (
        {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8, "num_key_value_heads": 2},
        {"depth": 12, "hidden_size": 768, "num_heads": 12, "intermediate_size": 3072},
    ),
    "2b": (
        {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 8, "num_key_value_heads": 2},
        {"depth": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096},
    ),
    "4b": (
        _LARGE | {"hidden_size": 2560, "intermediate_size": 9216},
        {"depth": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096},
    ),
    "9b": (
        _LARGE | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
        {"depth": 27, "hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304},
    ),
    # For tests and the demo: every pair of sizes that could be mixed up is unequal.
    "tiny": (
        {
            "vocab_size": 320,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 24,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 6,
            "rope_parameters": _TEXT["rope_parameters"] | {"mrope_section": [3, 3, 2]},
        },
        {"depth": 2, "hidden_size": 48, "num_heads": 2, "intermediate_size": 80, "num_position_embeddings": 36},
    ),
}
N_PARAMETERS = {
    "0.8b": 853_000_000,
    "2b": 2_213_000_000,
    "4b": 4_539_000_000,
    "9b": 9_409_000_000,
    "tiny": 600_000,
}
# Ids in the published vocabulary, counted from its first special token.
_SPECIAL_TOKENS = {
    "<|endoftext|>": 0,
    "<|im_start|>": 1,
    "<|im_end|>": 2,
    "<|vision_start|>": 9,
    "<|vision_end|>": 10,
    "<|vision_pad|>": 11,
    "<|image_pad|>": 12,
    "<|video_pad|>": 13,
    "<think>": 24,
    "</think>": 25,
}
_SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnpqrstvwyz" for vowel in "aeiou"]
_N_SPECIAL = 276  # rows of the published vocabulary from its first special token on, unused ones included


def special_tokens(vocab_size: int) -> dict[str, int]:
    """Special tokens by id: where the published vocabulary has them, or right behind the 256 bytes in a small one."""
    first = max(256, vocab_size - _N_SPECIAL)
    return {content: first + offset for content, offset in _SPECIAL_TOKENS.items()}


def random_config(size: str) -> dict[str, Any]:
    """config.json of one of N_PARAMETERS."""
    text, vision = _SIZES[size]
    special = special_tokens((_TEXT | text)["vocab_size"])
    return {
        "model_type": "qwen3_5",
        "text_config": _TEXT | text,
        "vision_config": _VISION | vision,
        "eos_token_id": [special["<|im_end|>"], special["<|endoftext|>"]],
    }


def random_tokenizer_json(vocab_size: int) -> dict[str, Any]:
    """A tokenizer.json in which every id below the special tokens has a text: the bytes first, then made-up words.

    No merge reaches the words, so texts are read byte by byte; but what a random model writes can be seen.
    """
    specials = special_tokens(vocab_size)
    document = byte_tokenizer_json(specials, vocab_size)
    words = {_word(i): 256 + i for i in range(min(specials.values()) - 256)}
    document["model"]["vocab"] |= words
    return document


def _word(i: int) -> str:
    """A blank and syllables, a digit of base 100 each, such as `Ġbado`; different for every i."""
    syllables = _SYLLABLES[i % 100]
    while i := i // 100:
        syllables += _SYLLABLES[i % 100]
    return "\u0120" + syllables  # a blank in the byte-level alphabet


class RandomWeights:
    """Tensors drawn when they are asked for, the same for the same seed and name.

    Values are normal with the variance that keeps activations in range, so that kernels run on ordinary numbers.
    """

    def __init__(self, seed: int, progress: Progress) -> None:
        self._seed = seed
        self._progress = progress

    def tensor(self, name: str, *shape: int) -> Floats:
        """A whole tensor, float32 of that shape."""
        values = self._draw(name, 0, int(np.prod(shape)))
        self._progress(values.size)
        return _scaled(name, values.reshape(shape))

    def matrix(self, name: str, rows: int, columns: int, *, again: bool = False) -> Matrix:
        """A matrix to be read in slices of rows. again: it has been read before, and makes no progress."""

        def read(start: int, stop: int) -> Floats:
            values = self._draw(name, start * columns, stop * columns)
            if not again:
                self._progress(values.size)
            return _scaled(name, values.reshape(stop - start, columns))

        return Matrix(rows, columns, read)

    def _draw(self, name: str, start: int, stop: int) -> Floats:
        """Standard normal values: of a tensor as a row of numbers those from `start` to `stop`, drawn in tiles."""
        tiles = range(start // TILE, -(-stop // TILE))
        drawn = []
        for tile in tiles:
            random = np.random.default_rng([self._seed, zlib.crc32(name.encode()), tile])
            drawn.append(random.standard_normal(min(TILE, stop - tile * TILE), np.float32))
        found: Floats = np.concatenate(drawn)[start - tiles.start * TILE :]
        return found


def _scaled(name: str, values: Floats) -> Floats:
    if name.endswith("A_log"):
        a: Floats = np.log(np.clip(np.abs(values) * 8, 0.01, 16))
        return a
    if values.ndim > 1:
        return values * np.float32(np.prod(values.shape[1:]) ** -0.5)
    return values * np.float32(0.02) + np.float32(name.endswith(ONE_CENTRED))
