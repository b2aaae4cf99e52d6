"""How onnxruntime's kernels round what they multiply by a quantised matrix, so that single rows give what all give.

With int8 activations the likeliest token of SmolLM2's head is another one in 1 to 3 % of its hidden states (5 % with
one scale for all of them): logits that are to be compared with the head's own have to be rounded alike.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Rounding = Callable[[Floats], Floats]
"""float32 [D] to what the kernel takes it for, float32 [D]."""
_TINY = np.finfo(np.float32).tiny


def plain(values: Floats) -> Floats:
    """Float kernels: as they are."""
    return values


def by_block(block: int) -> Rounding:
    """Of onnxruntime's own kernels: int8, symmetric, with one scale for each block of the matrix's."""

    def rounded(values: Floats) -> Floats:
        blocks = np.zeros((-(-len(values) // block), block), np.float32)
        blocks.reshape(-1)[: len(values)] = values
        scales = np.maximum(np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127), _TINY)
        found: Floats = (np.rint(blocks / scales) * scales).reshape(-1)[: len(values)]
        return found

    return rounded


def by_row(values: Floats) -> Floats:
    """Of KleidiAI's kernels, on ARM: int8 between the least and the largest of all values."""
    least, largest = min(values.min(), np.float32(0)), max(values.max(), np.float32(0))
    scale = max((largest - least) / np.float32(255), _TINY)
    zero = np.clip(np.rint(-128 - least / scale), -128, 127)
    levels = np.clip(np.rint(values / scale) + zero, -128, 127)
    found: Floats = ((levels - zero) * scale).astype(np.float32)
    return found


def nearest_to(expected: Floats, vector: Floats, product: Callable[[Floats], Floats], block: int) -> Rounding:
    """The one with which `product` of the vector is nearest to what a kernel gave for it.

    vector: float32 [D], best one with a few large values, which tell them apart. expected: float32 [n].
    """
    return min(
        (plain, by_block(block), by_row), key=lambda rounded: float(np.abs(product(rounded(vector)) - expected).max())
    )
