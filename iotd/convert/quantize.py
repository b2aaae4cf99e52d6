"""Blockwise symmetric quantisation, in the layout of onnxruntime's MatMulNBits.

Knows no file and no graph: float32 matrices in, codes and scales out.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint8]
Floats = NDArray[np.float32]


SMALLEST_SCALE = np.finfo(np.float32).tiny  # what is smaller has no finite inverse, and some kernels take it for zero
FACTORS = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""Of the scale that reaches a block's largest value, among which the best is searched."""
SEARCH_ROWS = 128
"""Of a matrix at a time: what they take stays in the processor's cache."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """A quantised matrix: W[n, k] ≈ (code − 2^(bits−1)) · scale of its block."""

    codes: Codes
    """uint8 [rows, blocks, block·bits/8]; for 4 bits the even element is in the low half of the byte."""
    scales: Floats
    """float32 [rows, blocks], each exactly representable in bfloat16."""
    bits: int
    columns: int


def quantize(weight: Floats, bits: int, block: int) -> Blocks:
    """Round a float32 [rows, columns] matrix to `bits` (4 or 8) with one scale per `block` of a row.

    The last block is padded with zeros. The value of largest magnitude maps to the code of largest magnitude,
    −2^(bits−1), so no code is wasted (the choice of llama.cpp's Q4_0). Scales are rounded to bfloat16 first, because
    ARM's KleidiAI kernels keep only that much of them.
    """
    grouped = group(weight, block)
    zero = 1 << (bits - 1)
    scales = kept(_extreme(grouped) / np.float32(-zero))
    return pack(levels(grouped, scales, zero), scales, bits, weight.shape[1])


def search_scales(weight: Floats, bits: int, block: int, importance: Floats) -> Floats:
    """The scales, float32 [rows, blocks], with the least sum of squared errors, each column's weighted by `importance`.

    importance: float32 [columns], the mean square of what the column is multiplied by. Plain errors are no measure:
    clipping the few large weights for them harms a real model more than it helps.
    """
    starts = range(0, len(weight), SEARCH_ROWS)
    return np.concatenate([_search(weight[at : at + SEARCH_ROWS], bits, block, importance) for at in starts])


def _search(weight: Floats, bits: int, block: int, importance: Floats) -> Floats:
    grouped = group(weight, block)
    zero = 1 << (bits - 1)
    unit = np.maximum(np.abs(grouped).max(axis=2), SMALLEST_SCALE)  # relative to it nothing overflows
    values = grouped / unit[..., None]
    weights = group(np.maximum(importance, 1e-6 * importance.max(initial=1e-30))[None], block)[0]
    sign = np.sign(_extreme(grouped))
    best = np.zeros_like(unit)
    least = np.full_like(unit, np.inf)

    def consider(scales: Floats) -> Floats:
        scales = kept(scales * unit) / unit
        found = levels(values, scales, zero)
        error = np.einsum("rbk,bk->rb", np.square(values - found * scales[..., None]), weights)
        better = error < least
        best[better], least[better] = scales[better], error[better]
        return found

    for factor in FACTORS:
        for reach in (-zero, zero - 1):  # which end of the codes the largest value goes to
            consider((sign * factor / reach).astype(np.float32))
    found = levels(values, best, zero)
    squares = np.einsum("rbk,bk->rb", np.square(found), weights)
    products = np.einsum("rbk,rbk,bk->rb", found, values, weights, optimize=True)
    consider(np.divide(products, squares, out=best.copy(), where=squares > 0))
    return kept(best * unit)


def levels(grouped: Floats, scales: Floats, zero: int) -> Floats:
    """The whole number of its scale, [rows, blocks], that each value of [rows, blocks, block] is rounded to."""
    found: Floats = np.clip(np.rint(grouped * inverse(scales)[..., None]), -zero, zero - 1)
    return found


def inverse(scales: Floats) -> Floats:
    """1 / scale, and 0 of a scale that is 0."""
    return np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)


def kept(scales: Floats) -> Floats:
    """Scales as a package keeps them: nearest bfloat16, ties to even, as float32; 0 for the smallest."""
    bits = np.ascontiguousarray(scales, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.abs(rounded) < SMALLEST_SCALE, np.float32(0), rounded)


def group(weight: Floats, block: int) -> Floats:
    """[rows, columns] → [rows, blocks, block], the last one padded with zeros."""
    rows, columns = weight.shape
    if columns % block:
        weight = np.pad(weight, ((0, 0), (0, -columns % block)))
    return weight.reshape(rows, -1, block)


def pack(found: Floats, scales: Floats, bits: int, columns: int) -> Blocks:
    """Levels, float32 [rows, blocks, block], as codes."""
    codes = (found + (1 << (bits - 1))).astype(np.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))
    return Blocks(np.ascontiguousarray(codes), scales, bits, columns)


def dequantize(blocks: Blocks) -> Floats:
    """The float32 [rows, columns] matrix that the codes stand for."""
    codes = blocks.codes
    if blocks.bits == 4:
        codes = np.stack([codes & 0x0F, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
    values = (codes.astype(np.float32) - (1 << (blocks.bits - 1))) * blocks.scales[..., None]
    return np.ascontiguousarray(values.reshape(len(codes), -1)[:, : blocks.columns])


def _extreme(grouped: Floats) -> Floats:
    """Of each block the value of largest magnitude, with its sign."""
    found: Floats = np.take_along_axis(grouped, np.abs(grouped).argmax(axis=2)[..., None], axis=2)[..., 0]
    return found
