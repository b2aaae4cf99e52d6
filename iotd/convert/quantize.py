"""Blockwise symmetric quantisation, in the layout of onnxruntime's MatMulNBits.

Knows no file and no graph: float32 matrices in, codes and scales out.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint8]
Floats = NDArray[np.float32]


SMALLEST_SCALE = np.finfo(np.float32).tiny  # what is smaller has no finite inverse, and some kernels take it for zero


@dataclass(frozen=True, slots=True)
class Blocks:
    """A quantised matrix: W[n, k] ≈ (code − 2^(bits−1)) · scale of its block."""

    codes: Codes
    """uint8 [rows, blocks, block·bits/8]; for 4 bits the even element is in the low half of the byte."""
    scales: Floats
    """float32 [rows, blocks], each exactly representable in bfloat16."""
    bits: int
    columns: int


SHRINKS = (1.0, 0.925, 0.85, 0.775, 0.7)
"""Of a 4-bit block's scale: clipping its few largest values a little rounds all the others more finely."""


def quantize(weight: Floats, bits: int, block: int) -> Blocks:
    """Round a float32 [rows, columns] matrix to `bits` (4 or 8) with one scale per `block` of a row.

    The last block is padded with zeros. The value of largest magnitude maps to the code of largest magnitude,
    −2^(bits−1), so no code is wasted (the choice of llama.cpp's Q4_0); with 4 bits the scale is then shrunk as far as
    that makes the sum of squared errors smaller. Scales are rounded to bfloat16 first, because ARM's KleidiAI kernels
    keep only that much of them.
    """
    rows, columns = weight.shape
    blocks = -(-columns // block)
    padded = np.zeros((rows, blocks * block), np.float32)
    padded[:, :columns] = weight
    grouped = padded.reshape(rows, blocks, block)
    zero = 1 << (bits - 1)
    extreme = np.take_along_axis(grouped, np.abs(grouped).argmax(axis=2)[..., None], axis=2)[..., 0]
    largest = (extreme / -zero).astype(np.float32)
    scales, levels = _rounded(grouped, largest, zero)
    if bits == 4:
        least = _error(grouped, scales, levels)
        for shrink in SHRINKS[1:]:
            shrunk = _rounded(grouped, largest * np.float32(shrink), zero)
            error = _error(grouped, *shrunk)
            better = error < least
            scales[better], levels[better], least[better] = shrunk[0][better], shrunk[1][better], error[better]
    codes = (levels + zero).astype(np.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))
    return Blocks(np.ascontiguousarray(codes), scales, bits, columns)


def _rounded(grouped: Floats, scales: Floats, zero: int) -> tuple[Floats, Floats]:
    """The scales as they are kept, [rows, blocks], and the whole number of them that each value is, [..., block]."""
    scales = _round_to_bfloat16(scales)
    scales[np.abs(scales) < SMALLEST_SCALE] = 0
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    return scales, np.clip(np.rint(grouped * inverse[..., None]), -zero, zero - 1)


def _error(grouped: Floats, scales: Floats, levels: Floats) -> Floats:
    """Sum of squared errors of each block, relative to its largest value so that nothing overflows."""
    unit = np.maximum(np.abs(grouped).max(axis=2, keepdims=True), SMALLEST_SCALE)
    off = grouped / unit - levels * (scales[..., None] / unit)
    found: Floats = np.einsum("rbk,rbk->rb", off, off)
    return found


def dequantize(blocks: Blocks) -> Floats:
    """The float32 [rows, columns] matrix that the codes stand for."""
    codes = blocks.codes
    if blocks.bits == 4:
        codes = np.stack([codes & 0x0F, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
    values = (codes.astype(np.float32) - (1 << (blocks.bits - 1))) * blocks.scales[..., None]
    return np.ascontiguousarray(values.reshape(len(codes), -1)[:, : blocks.columns])


def _round_to_bfloat16(values: Floats) -> Floats:
    """Nearest bfloat16, ties to even, kept as float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)
