"""iotd's model against what transformers said once: the same laws as the oracle's, without torch."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from divergence import divergence
from numpy.typing import NDArray

from iotd.convert.convert import convert_checkpoint
from iotd.model import Model

GOLDEN = Path(__file__).parent / "golden"
LOGITS_TOLERANCE = 2e-4
VISION_TOLERANCE = 1e-3
EVERY = 8  # expected.npz holds the logits after every eighth token, from the first on
Expected = Mapping[str, NDArray[np.float32]]


@pytest.fixture(scope="module", params=["grouped", "untied"])
def folder(request: pytest.FixtureRequest) -> Path:
    return GOLDEN / str(request.param)


@pytest.fixture(scope="module")
def expected(folder: Path) -> Expected:
    with np.load(folder / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def model(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    package = tmp_path_factory.mktemp("golden") / "fp32"
    convert_checkpoint(folder, package, recipe="fp32")
    return Model.open(package)


def test_one_prefill_agrees(model: Model, expected: Expected) -> None:
    """One chunk gives transformers' logits."""
    ids = expected["ids"].astype(np.int64)
    for row in (0, 3, 11):
        state = model.new_state(len(ids))
        assert_close(model.prefill(state, ids[: row * EVERY + 1]), expected["logits"][row])


def test_steps_agree(model: Model, expected: Expected) -> None:
    """Token by token gives transformers' logits."""
    state = model.new_state(len(expected["ids"]))
    for at, token in enumerate(expected["ids"]):
        logits = model.step(state, int(token))
        if at % EVERY == 0:
            assert_close(logits, expected["logits"][at // EVERY])


def test_chunks_agree(model: Model, expected: Expected) -> None:
    """Chunks of the distance between the known logits give each of them."""
    ids = expected["ids"].astype(np.int64)
    state = model.new_state(len(ids))
    model.prefill(state, ids[:1])
    for row, start in enumerate(range(1, len(ids) - EVERY + 1, EVERY), start=1):
        assert_close(model.prefill(state, ids[start : start + EVERY]), expected["logits"][row])


def test_an_image_agrees(model: Model, expected: Expected) -> None:
    """An image's embeddings, and the logits behind it, are transformers'."""
    rgb = expected["rgb"].astype(np.uint8)
    embeddings, grid = model.encode_image(rgb), model.image_grid(rgb.shape)
    np.testing.assert_allclose(embeddings, expected["embeddings"], atol=VISION_TOLERANCE, rtol=0)
    state = model.new_state(len(embeddings) + 7)
    model.prefill(state, [1, 2, 3], logits=False)
    model.prefill_embeddings(state, embeddings, grid=grid)
    assert_close(model.prefill(state, [4, 5, 6, 7]), expected["logits_behind_image"])


def test_int4_differs_only_by_int8_activations(folder: Path, expected: Expected, tmp_path: Path) -> None:
    """The int4 package is much nearer to transformers with the dequantised weights than that is to float32."""
    convert_checkpoint(folder, tmp_path / "int4", recipe="int4")
    model = Model.open(tmp_path / "int4")
    ids = expected["ids"].astype(np.int64)
    state = model.new_state(len(ids))
    found = np.stack([model.step(state, int(token)).copy() for token in ids])[::EVERY]
    of_weights = divergence(expected["logits"], expected["int4_logits"])
    assert divergence(expected["int4_logits"], found) < 0.25 * of_weights


def assert_close(found: NDArray[np.float32] | None, expected: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(found, expected, atol=LOGITS_TOLERANCE, rtol=0)
