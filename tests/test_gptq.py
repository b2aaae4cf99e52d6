"""Rounding by inputs follows its formula to the letter, and changes what a matrix computes less than plain rounding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from iotd.convert.gptq import DAMPING, Statistics, gptq
from iotd.convert.quantize import dequantize, group, levels, pack, quantize, search_scales

Floats = NDArray[np.float32]


def inputs(n: int, columns: int, seed: int, spread: float = 1.0) -> Floats:
    """Correlated, with channels of very unequal size, float32 [n, columns]."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((n, columns)) @ (np.eye(columns) + 0.3 * rng.standard_normal((columns, columns)))
    return (mixed * np.exp(spread * rng.standard_normal(columns))).astype(np.float32)


def error(weight: Floats, rounded: Floats, x: Floats) -> float:
    return float(np.square((weight - rounded) @ x.T).sum() / np.square(weight @ x.T).sum())


@pytest.mark.parametrize(("columns", "block"), [(256, 128), (150, 32), (70, 64), (1, 16)])
@pytest.mark.parametrize("seed", [0, 1])
def test_outputs_change_less_than_with_scales_or_levels_alone(columns: int, block: int, seed: int) -> None:
    """On inputs that were not seen, too."""
    weight = np.random.default_rng(seed).standard_normal((40, columns)).astype(np.float32)
    seen = inputs(3000, columns, seed)
    fit, held = seen[:2000], seen[2000:]
    statistics = Statistics.of(fit.T @ fit / np.float32(len(fit)))
    scales = search_scales(weight, 4, block, statistics.importance)
    searched = pack(levels(group(weight, block), scales, 8), scales, 4, columns)
    found = [error(weight, dequantize(x), held) for x in (gptq(weight, 4, block, statistics), searched)]
    plain = error(weight, dequantize(quantize(weight, 4, block)), held)
    if columns == 1:
        assert found[0] <= found[1] <= plain * 1.01
    else:
        assert found[0] < 0.8 * found[1] < 0.8 * plain


@given(rows=st.integers(1, 5), columns=st.integers(1, 90), bits=st.sampled_from([4, 8]), seed=st.integers(0, 99))
def test_each_column_makes_up_for_those_before(rows: int, columns: int, bits: int, seed: int) -> None:
    """As the inverse of the moment has it (Frantar et al., algorithm 1), one column and one update at a time."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    x = inputs(400, columns, seed, spread=0.3)
    moment = x.T @ x / np.float32(400)
    statistics = Statistics.of(moment)
    found = dequantize(gptq(weight, bits, 16, statistics))
    scales = np.repeat(search_scales(weight, bits, 16, statistics.importance), 16, axis=1)[:, :columns]
    expected = slow(weight.astype(np.float64), scales.astype(np.float64), moment.astype(np.float64), bits)
    # A value at the edge between two levels may fall to either side, and takes what follows with it.
    same = np.isclose(found, expected, rtol=1e-4, atol=1e-6).all(axis=1)
    assert same.mean() >= 0.5 or error(weight, found, x) < 1.2 * error(weight, expected.astype(np.float32), x)


def slow(weight: np.ndarray, scales: np.ndarray, moment: np.ndarray, bits: int) -> np.ndarray:
    order = np.argsort(-np.diagonal(moment), kind="stable")
    damped = moment + DAMPING * np.diagonal(moment).mean() * np.eye(len(moment))
    inverse = np.linalg.inv(damped[np.ix_(order, order)])
    upper = np.linalg.cholesky(inverse).T
    left, rounded = weight[:, order].copy(), np.zeros_like(weight)
    zero = 1 << (bits - 1)
    for k in range(len(order)):
        scale = scales[:, order[k]]
        level = np.clip(np.rint(left[:, k] / np.where(scale == 0, 1, scale)), -zero, zero - 1) * (scale != 0)
        rounded[:, order[k]] = level * scale
        left -= np.outer((left[:, k] - level * scale) / upper[k, k], upper[k]) * (np.arange(len(order)) >= k)
    return rounded


def test_inputs_that_are_never_there_do_no_harm() -> None:
    """Columns of a dead channel are rounded as they are; nothing is divided by nothing."""
    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    x = inputs(500, 64, 0)
    x[:, ::3] = 0
    rounded = dequantize(gptq(weight, 4, 32, Statistics.of(x.T @ x / np.float32(500))))
    assert np.isfinite(rounded).all()
    assert error(weight, rounded, x) < 0.05
    silent = dequantize(gptq(weight, 4, 32, Statistics.of(np.zeros((64, 64), np.float32))))
    assert np.isfinite(silent).all() and np.abs(weight - silent).max() < 0.5


def test_an_empty_block_keeps_its_zeros() -> None:
    weight = np.zeros((3, 64), np.float32)
    weight[:, 40] = 1
    x = inputs(300, 64, 1)
    rounded = dequantize(gptq(weight, 4, 32, Statistics.of(x.T @ x / np.float32(300))))
    assert (rounded[:, :32] == 0).all()
    assert error(weight, rounded, x) < 0.02
