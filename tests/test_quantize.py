"""Blockwise rounding of weights: how far it may be off, and that onnxruntime reads the codes as they are meant."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from onnx import TensorProto

from iotd.convert.graph import GraphWriter
from iotd.convert.quantize import SMALLEST_SCALE, Blocks, dequantize, group, levels, pack, quantize, search_scales
from iotd.convert.rounding import Nearest
from iotd.convert.weights import Matrix
from iotd.model.package import Recipe
from iotd.model.table import RowTable

Floats = NDArray[np.float32]
ROUNDING = 2.0**-8
"""Relative error of a scale that was rounded to bfloat16's eight bits."""

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
ORDINARY = st.floats(-2, 2, width=32)
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 70))
MATRICES = st.one_of(arrays(np.float32, SHAPES, elements=values) for values in (ORDINARY, FINITE))
BITS = st.sampled_from([4, 8])
BLOCK = st.sampled_from([16, 32, 64])


def scale_of_each(blocks: Blocks, block: int) -> Floats:
    """The scale of every element, float32 [rows, columns]."""
    return np.repeat(blocks.scales, block, axis=1)[:, : blocks.columns]


@given(weight=MATRICES, bits=BITS, block=BLOCK)
def test_no_element_is_off_by_more_than_its_step(weight: Floats, bits: int, block: int) -> None:
    """Half a step; for those beyond the codes by as much as they are beyond, for which the others are nearer."""
    blocks = quantize(weight, bits, block)
    scales = scale_of_each(blocks, block).astype(np.float64)
    step = np.abs(scales)
    levels = 1 << (bits - 1)
    ends = np.sort([-levels * scales, (levels - 1) * scales], axis=0)
    beyond = np.maximum(weight - ends[1], ends[0] - weight).clip(0)
    error = np.abs(dequantize(blocks).astype(np.float64) - weight)
    slack = levels * ROUNDING * step + levels * SMALLEST_SCALE
    assert (error <= np.maximum(0.5 * step, beyond) + slack).all()


def on_grid(bits: Any) -> Nearest:
    return Nearest(Recipe(name="test", bits=bits, vision_bits=bits, block=32))


@given(weight=MATRICES, block=BLOCK, seed=st.integers(0, 9))
def test_a_searched_scale_leaves_less_error_in_each_block(weight: Floats, block: int, seed: int) -> None:
    """Than one that reaches the largest value: never more of it, in the sum of squares weighted by importance."""
    importance = np.random.default_rng(seed).random(weight.shape[1], np.float32) + np.float32(0.01)
    scales = search_scales(weight, 4, block, importance)
    found = pack(levels(group(weight, block), scales, 8), scales, 4, weight.shape[1])
    plain = squares(quantize(weight, 4, block), weight, block, importance)
    assert (squares(found, weight, block, importance) <= plain * (1 + 1e-3)).all()


def squares(blocks: Blocks, weight: Floats, block: int, importance: Floats) -> NDArray[np.float64]:
    off = (dequantize(blocks).astype(np.float64) - weight) ** 2 * importance
    return np.add.reduceat(off, np.arange(0, weight.shape[1], block), axis=1)


@given(weight=MATRICES, block=BLOCK)
def test_with_8_bits_the_largest_of_a_block_is_kept(weight: Floats, block: int) -> None:
    """Up to the rounding of its scale."""
    found = dequantize(quantize(weight, 8, block))
    for start in range(0, weight.shape[1], block):
        part = weight[:, start : start + block]
        at = np.abs(part).argmax(axis=1)
        rows = np.arange(len(part))
        largest = part[rows, at].astype(np.float64)
        off = np.abs(found[:, start : start + block][rows, at] - largest)
        assert (off <= ROUNDING * np.abs(largest) + 256 * SMALLEST_SCALE).all()


@given(weight=MATRICES, bits=BITS, block=BLOCK)
def test_scales_are_bfloat16_and_have_an_inverse(weight: Floats, bits: int, block: int) -> None:
    scales = quantize(weight, bits, block).scales
    assert not (scales.view(np.uint32) & 0xFFFF).any()
    assert np.isfinite(1 / scales[scales != 0]).all()


@given(weight=MATRICES, bits=BITS, block=BLOCK)
def test_blocks_do_not_know_of_each_other(weight: Floats, bits: int, block: int) -> None:
    """Each is rounded as if it were alone, so slices of rows give what the whole gives."""
    blocks = quantize(weight, bits, block)
    rows = [quantize(weight[i : i + 1], bits, block) for i in range(len(weight))]
    assert np.array_equal(blocks.codes, np.concatenate([row.codes for row in rows]))
    first = quantize(weight[:, :block], bits, block)
    assert np.array_equal(first.codes, blocks.codes[:, :1])
    assert np.array_equal(first.scales, blocks.scales[:, :1])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -3e-39, 1e-37])
def test_zeros_and_what_is_almost_zero_stay_so(bits: int, value: float) -> None:
    """Without a warning, and without disturbing the block beside them."""
    weight = np.full((2, 64), value, np.float32)
    weight[:, 32:] = 1
    found = dequantize(quantize(weight, bits, 32))
    assert (np.abs(found[:, :32]) <= 2e-37).all()
    np.testing.assert_allclose(found[:, 32:], 1, rtol=ROUNDING)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_lie_as_documented(bits: int) -> None:
    """Multiples of the scale are exact; for 4 bits the even element is in the low half; the padding is zeros."""
    levels = 1 << (bits - 1)
    codes = np.arange(33) % (2 * levels)
    codes[:2] = 0, 3
    weight = (codes - levels).astype(np.float32)[None]
    blocks = quantize(weight, bits, 32)
    assert blocks.codes.shape == (1, 2, 32 * bits // 8)
    unpacked = (
        blocks.codes if bits == 8 else np.stack([blocks.codes & 15, blocks.codes >> 4], axis=-1).reshape(1, 2, 32)
    )
    assert unpacked[0, 0].tolist() == codes[:32].tolist()
    assert (unpacked[0, 1, 1:] == levels).all()
    assert np.array_equal(weight, dequantize(blocks))


@pytest.fixture(scope="module", params=[4, 8])
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One MatMulNBits of a matrix whose last block is padded, and the same matrix as an embedding table."""
    bits, folder = int(request.param), tmp_path_factory.mktemp("graph")
    weight = np.random.default_rng(bits).standard_normal((23, 75)).astype(np.float32)
    with GraphWriter(folder / "one.onnx", on_grid(bits)) as writer:
        x = writer.input("x", TensorProto.FLOAT, ("T", 75))
        writer.output("y", TensorProto.FLOAT, ("T", 23))
        entry = writer.table("table", Matrix.of(weight))
        writer.matmul(x, "table", 75, 23, out="y")
    return {"folder": folder, "entry": entry, "wanted": dequantize(quantize(weight, bits, 32)), "bits": bits}


@pytest.mark.parametrize("n_rows", [1, 5, 40])
def test_onnxruntime_multiplies_by_what_the_codes_stand_for(graph: dict[str, Any], n_rows: int) -> None:
    """Up to its rounding of activations to 8 bits, of which each block of a row has its own scale."""
    session = ort.InferenceSession(graph["folder"] / "one.onnx", providers=["CPUExecutionProvider"])
    x = np.random.default_rng(n_rows).standard_normal((n_rows, 75)).astype(np.float32)
    (found,) = session.run(["y"], {"x": x})
    wanted = x.astype(np.float64) @ graph["wanted"].T.astype(np.float64)
    half_step = np.abs(x).max() / 127 / 2
    assert np.abs(found - wanted).max() <= half_step * np.abs(graph["wanted"]).sum(axis=1).max()


def test_onnxruntime_is_exact_on_activations_of_8_bits(graph: dict[str, Any]) -> None:
    """Whole numbers up to 127, the largest in every block, lose nothing: what is left is the order of additions."""
    session = ort.InferenceSession(graph["folder"] / "one.onnx", providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).integers(-127, 128, (3, 75)).astype(np.float32)
    x[:, ::32] = 127
    (found,) = session.run(["y"], {"x": x})
    np.testing.assert_allclose(found, x @ graph["wanted"].T, rtol=0, atol=2e-3)


def test_the_embedding_table_reads_what_the_codes_stand_for(graph: dict[str, Any]) -> None:
    table = RowTable(graph["folder"], graph["entry"], 23, 75)
    ids = np.array([22, 0, 7, 7], np.int64)
    rows = np.zeros((4, 75), np.float32)
    table.rows(ids, rows)
    assert np.array_equal(rows, graph["wanted"][ids])


def test_a_float_table_is_read_as_it_is(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((9, 10)).astype(np.float32)
    with GraphWriter(tmp_path / "one.onnx", on_grid(32)) as writer:
        x = writer.input("x", TensorProto.FLOAT, ("T", 10))
        writer.output("y", TensorProto.FLOAT, ("T", 9))
        writer.constant("something before it", np.zeros(2000, np.float32))
        entry = writer.table("table", Matrix.of(weight))
        writer.matmul(x, "table", 10, 9, out="y")
    rows = np.zeros((2, 10), np.float32)
    RowTable(tmp_path, entry, 9, 10).rows(np.array([8, 1]), rows)
    assert np.array_equal(rows, weight[[8, 1]])
    session = ort.InferenceSession(tmp_path / "one.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(["y"], {"x": rows})[0], rows @ weight.T, atol=1e-5)
