"""The grids of llama.cpp's Q4_K and Q6_K, for comparison: what their files hold, as float32 matrices.

The layouts are those of ggml's `ggml-common.h`. Where rows are no multiples of 256, super-blocks have 128 values, which
llama.cpp does not do: it stores such matrices in more bits. Knows no graph.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
SUB_BLOCK = 32  # of Q4_K
FINE_BLOCK = 16  # of Q6_K
SMALL = np.float32(1e-30)
ALIKE = np.float32(1e-6)
SPANS = 0.1 * np.arange(21) - 1
"""What is added to the 15 steps between a sub-block's least and largest value: the scales that llama.cpp tries."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A way to store a matrix."""

    name: str
    nbits: float
    """Of a value, with its part of the scales, in super-blocks of 256."""


Q4_K = Grid("Q4_K", 8 * 144 / 256)
Q6_K = Grid("Q6_K", 8 * 210 / 256)


def mixture(name: str, n_layers: int) -> Grid:
    """Which grid Q4_K_M has for a matrix: the finer one for the table and half of the v and down projections."""
    if not name.startswith("text.layers."):
        return Q6_K
    i, eighth = int(name.split(".")[2]), n_layers // 8
    more = i < eighth or i >= 7 * n_layers // 8 or (i - eighth) % 3 == 2
    return Q6_K if more and name.endswith(("v_proj", "down_proj")) else Q4_K


def on_grid(weight: Floats, grid: Grid) -> Floats:
    """A float32 [rows, columns] matrix as the grid holds it."""
    super_block = 256 if weight.shape[1] % 256 == 0 else 128
    rounded = _q4_k if grid is Q4_K else _q6_k
    return np.ascontiguousarray(rounded(weight, super_block)[:, : weight.shape[1]])


def _grouped(weight: Floats, size: int, super_block: int) -> Floats:
    """[rows, blocks, size], padded with zeros to whole super-blocks."""
    return np.pad(weight, ((0, 0), (0, -weight.shape[1] % super_block))).reshape(len(weight), -1, size)


def _q4_k(weight: Floats, super_block: int) -> Floats:
    """Sub-blocks of 32 with scale and offset of 6 bits each, which are multiples of two float16 of the super-block."""
    groups = _grouped(weight, SUB_BLOCK, super_block)
    scales, offsets = _least_squares(groups)
    per = super_block // SUB_BLOCK
    scales, offsets = _in_six_bits(scales, per), _in_six_bits(-offsets, per)
    levels = np.clip(np.rint((groups + offsets[..., None]) / np.maximum(scales, SMALL)[..., None]), 0, 15)
    return (levels * scales[..., None] - offsets[..., None]).reshape(len(weight), -1)


def _least_squares(groups: Floats) -> tuple[Floats, Floats]:
    """Scale and (not positive) offset of each sub-block [rows, blocks], of the trials the ones of least error.

    Errors are weighted by each value's magnitude, as llama.cpp does without an importance matrix.
    """
    weights = np.abs(groups) + np.sqrt((groups**2).mean(axis=2, keepdims=True))
    low = np.minimum(groups.min(axis=2), 0)
    span = np.maximum(groups.max(axis=2) - low, SMALL)
    least = np.full(span.shape, np.inf, np.float32)
    best = [np.zeros_like(span), np.zeros_like(span)]
    for more in (0.0, *SPANS):
        inverse = np.float32(15 + more) / span
        levels = np.clip(np.rint((groups - low[..., None]) * inverse[..., None]), 0, 15)
        scales, offsets = _fit(groups, levels, weights)
        error = (weights * (levels * scales[..., None] + offsets[..., None] - groups) ** 2).sum(axis=2)
        better = error < least
        for kept, new in zip((least, *best), (error, scales, offsets), strict=True):
            kept[better] = new[better]
    return best[0], best[1]


def _fit(groups: Floats, levels: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """The weighted least squares of groups ≈ levels · scale + offset, with no offset where it would be positive."""
    total, values, ones = weights.sum(axis=2), (weights * groups).sum(axis=2), (weights * levels).sum(axis=2)
    squares, products = (weights * levels**2).sum(axis=2), (weights * groups * levels).sum(axis=2)
    determinant = total * squares - ones**2
    alike = determinant <= ALIKE * total * squares  # one level only, which fits any offset
    determinant[alike] = 1
    scales = (total * products - values * ones) / determinant
    offsets = (squares * values - ones * products) / determinant
    alone = alike | (offsets > 0)
    scales[alone] = (products / np.maximum(squares, SMALL))[alone]
    offsets[alone] = 0
    return scales, offsets


def _in_six_bits(values: Floats, per: int) -> Floats:
    """Values [rows, blocks], not negative, as multiples 0 to 63 of a float16 that `per` of them share."""
    together = values.reshape(len(values), -1, per)
    unit = np.maximum((together.max(axis=2, keepdims=True) / 63).astype(np.float16).astype(np.float32), SMALL)
    return (np.clip(np.rint(together / unit), 0, 63) * unit).reshape(values.shape)


def _q6_k(weight: Floats, super_block: int) -> Floats:
    """Blocks of 16, symmetric, with a scale of 8 bits each, which are multiples of a float16 of the super-block."""
    groups = _grouped(weight, FINE_BLOCK, super_block)
    scales = _symmetric(groups)
    together = scales.reshape(len(weight), -1, super_block // FINE_BLOCK)
    extreme = np.take_along_axis(together, np.abs(together).argmax(axis=2, keepdims=True), axis=2)
    unit = (extreme / -128).astype(np.float16).astype(np.float32)
    inverse = np.divide(1, unit, out=np.zeros_like(unit), where=unit != 0)
    scales = (np.minimum(np.rint(together * inverse), 127) * unit).reshape(scales.shape)
    return (_levels(groups, scales) * scales[..., None]).reshape(len(weight), -1)


def _symmetric(groups: Floats) -> Floats:
    """The scale of each block of 6 bits, of the trials of llama.cpp the one of least error weighted by x²."""
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(axis=2, keepdims=True), axis=2)[..., 0]
    best, gain = np.zeros_like(extreme), np.full(extreme.shape, -1, np.float32)
    for more in 0.1 * np.arange(-9, 10):
        levels = _levels(groups, extreme / np.float32(-(32 + more)))
        weights = groups**2
        products, squares = (weights * groups * levels).sum(axis=2), (weights * levels**2).sum(axis=2)
        found = np.divide(products, squares, out=np.zeros_like(squares), where=squares > 0)
        better = found * products > gain
        best[better], gain[better] = found[better], (found * products)[better]
    return best


def _levels(groups: Floats, scales: Floats) -> Floats:
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    return np.clip(np.rint(groups * inverse[..., None]), -32, 31)
