"""Kernels' rounding of activations: told apart by what they give, and done as they do it."""

import numpy as np
import pytest
from numpy.typing import NDArray

from iotd.model.activations import Rounding, by_block, by_row, nearest_to, plain

Floats = NDArray[np.float32]
RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((64, 96)).astype(np.float32)
VECTOR = RNG.standard_normal(96).astype(np.float32)
VECTOR[::24] *= 30


@pytest.mark.parametrize("kernel", [plain, by_block(32), by_row])
def test_a_kernel_is_known_by_what_it_gives(kernel: Rounding) -> None:
    found = nearest_to(ROWS @ kernel(VECTOR), VECTOR, lambda vector: ROWS @ vector, 32)
    np.testing.assert_array_equal(found(VECTOR), kernel(VECTOR))


@pytest.mark.parametrize(("kernel", "step"), [(by_block(32), 1 / 127), (by_row, 2 / 255)])
def test_values_are_rounded_by_half_a_step_at_most(kernel: Rounding, step: float) -> None:
    assert np.abs(kernel(VECTOR) - VECTOR).max() <= 0.51 * step * np.abs(VECTOR).max()


def test_a_last_block_may_be_short() -> None:
    np.testing.assert_array_equal(by_block(64)(VECTOR)[64:], by_block(32)(VECTOR[64:]))


@pytest.mark.parametrize("kernel", [by_block(32), by_row])
def test_nothing_stays_nothing(kernel: Rounding) -> None:
    np.testing.assert_array_equal(kernel(np.zeros(96, np.float32)), np.zeros(96))
