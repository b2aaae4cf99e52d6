"""Balanced weights compute what the checkpoint's do, and no column of a matrix is larger than the others."""

from pathlib import Path

import numpy as np
import pytest
from checkpoints import GOLDEN
from numpy.typing import NDArray
from twins import Severity, twin

from iotd.convert.balance import Balanced
from iotd.convert.checkpoint import Checkpoint
from iotd.convert.graph import GraphWriter
from iotd.convert.layers import FLOAT, Layers
from iotd.convert.spec import spec_from_config
from iotd.convert.stack import TextStack
from iotd.convert.weights import CheckpointWeights, Weights
from iotd.demo.package import CHECKPOINT
from iotd.model.spec import ModelSpec

Floats = NDArray[np.float32]
IDS = [np.random.default_rng(0).integers(0, 256, 60)]


def opened(checkpoint: Path) -> tuple[ModelSpec, Weights]:
    found = Checkpoint(checkpoint)
    spec = spec_from_config(found.config, checkpoint, tied=not found.has("head.weight"), vision=False)
    return spec, CheckpointWeights(found, lambda _: None)


def logits(spec: ModelSpec, weights: Weights, work: Path) -> Floats:
    stack = TextStack(spec, weights)
    head = stack.head() or stack.embedding()
    found: Floats = Layers(stack, IDS, work).hidden(FLOAT) @ head.read(0, head.rows).T
    return found


@pytest.fixture(params=[CHECKPOINT, GOLDEN / "grouped", GOLDEN / "untied"], ids=lambda path: path.name)
def stretched(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Twins with channels far apart: with heads that share values, and with a head of its own."""
    return twin(request.param, tmp_path / "twin", Severity(0.6, "student"))


def test_balanced_weights_compute_the_same(stretched: Path, tmp_path: Path) -> None:
    """To the rounding of float32."""
    spec, weights = opened(stretched)
    expected, found = (logits(spec, each, tmp_path) for each in (weights, Balanced(weights, spec)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_the_columns_that_read_one_input_are_equally_large(stretched: Path, tmp_path: Path) -> None:
    """Together, over all matrices that do; where heads share a channel, over these heads."""
    spec, weights = opened(stretched)
    stack = TextStack(spec, Balanced(weights, spec))
    for i in range(len(spec.layers)):
        with GraphWriter(tmp_path / "layer.onnx", FLOAT) as graph:
            stack.write_layer(graph, i)
        squares: dict[str, Floats] = {}
        for name, linear in graph.linears.items():
            found = np.square(linear.weight.read(0, linear.weight.rows)).sum(axis=0)
            squares[linear.x] = squares.get(linear.x, 0) + by_channel(spec, name, found)
        assert len(squares) == 4
        for sizes in squares.values():
            np.testing.assert_allclose(sizes, sizes.mean(), rtol=1e-4)


def by_channel(spec: ModelSpec, name: str, squares: Floats) -> Floats:
    """Of all columns, those that read one channel together."""
    if name.endswith("o_proj"):
        return squares.reshape(spec.num_kv_heads, -1, spec.head_dim).sum(axis=1).reshape(-1)
    return squares.reshape(-1, spec.linear_value_dim).sum(axis=0) if name.endswith("out_proj") else squares
