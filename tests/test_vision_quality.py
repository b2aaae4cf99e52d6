"""A package's vision tower gives the embeddings of its float32 original, however far its channels lie apart."""

import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from checkpoints import GOLDEN
from numpy.typing import NDArray
from tower_twins import Tower, stretch, swell, twin

from iotd.convert.convert import RECIPES, convert_checkpoint
from iotd.convert.samples.pictures import pictures
from iotd.demo.package import CHECKPOINT
from iotd.demo.scene import KINDS, draw
from iotd.events import RGB
from iotd.model.package import VISION, Recipe, read_manifest
from iotd.model.session import Threads, open_session
from iotd.model.spec import VisionSpec
from iotd.model.vision import VisionEncoder

Floats = NDArray[np.float32]
MOST_PIXELS = 128 * 128
LEAST_TOKENS = 10
"""Of a picture of that size, whatever a token's size and the picture's shape."""
MOST = 0.01
"""How far a token's embedding may be off, relative to its length."""


@pytest.fixture(scope="module")
def shown() -> list[RGB]:
    """Twenty: the demo's scenes, and pictures with the textures of photographs."""
    random = np.random.default_rng(0)
    scenes = [draw(random.permutation(list(KINDS))[: n % 4], random, light=1 - n % 3 * 0.3).rgb for n in range(10)]
    return scenes + pictures(10, seed=99)


def embeddings(package: Path, shown: list[RGB]) -> Floats:
    """Of all pictures' tokens, float32 [n, D]."""
    spec = read_manifest(package).spec.vision
    assert spec is not None
    encoder = VisionEncoder(package, spec, partial(open_session, threads=Threads(1)), MOST_PIXELS)
    return np.concatenate([encoder.encode(rgb) for rgb in shown])


def convert(checkpoint: Path, out: Path, recipe: str) -> Path:
    convert_checkpoint(checkpoint, out, recipe=recipe)
    return out


def off(found: Floats, exact: Floats) -> Floats:
    """Of each token, relative to its embedding's length."""
    return np.asarray(np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1))


def same(_tower: Tower) -> None:
    pass


@pytest.mark.parametrize("change", [same, stretch, swell])
@pytest.mark.parametrize("source", [CHECKPOINT, GOLDEN / "grouped"], ids=lambda path: path.name)
def test_every_token_of_a_picture_is_as_in_float32(
    source: Path, change: Callable[[Tower], None], shown: list[RGB], tmp_path: Path
) -> None:
    """Within 1 % of its length, of 20 pictures, as the checkpoint is and with outliers."""
    checkpoint = twin(source, tmp_path / "checkpoint", change)
    exact = embeddings(convert(checkpoint, tmp_path / "fp32", "fp32"), shown)
    found = embeddings(convert(checkpoint, tmp_path / "int4", "int4"), shown)
    assert len(exact) >= 20 * LEAST_TOKENS
    assert off(found, exact).max() <= MOST


def test_a_stretched_tower_computes_what_it_computed(shown: list[RGB], tmp_path: Path) -> None:
    exact = embeddings(convert(CHECKPOINT, tmp_path / "package", "fp32"), shown)
    found = embeddings(convert(twin(CHECKPOINT, tmp_path / "checkpoint", stretch), tmp_path / "twin", "fp32"), shown)
    assert off(found, exact).max() <= 1e-4


@pytest.mark.parametrize("change", [stretch, swell])
def test_twins_have_what_8_bits_cannot_hold(
    change: Callable[[Tower], None], shown: list[RGB], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else that float16 holds it would say nothing. Packages that have such a tower still open."""
    monkeypatch.setitem(RECIPES, "older", Recipe(name="older", bits=4, vision_bits=8, block=64))
    checkpoint = twin(CHECKPOINT, tmp_path / "checkpoint", change)
    exact, found = (embeddings(convert(checkpoint, tmp_path / recipe, recipe), shown) for recipe in ("fp32", "older"))
    assert np.quantile(off(found, exact), 0.9) > 10 * MOST


def test_no_kernel_rounds_what_weights_are_multiplied_by(tmp_path: Path) -> None:
    """Processors differ in how they do that: the graph has the operators of the float32 one, and widens its weights."""
    exact, found = (operators(convert(CHECKPOINT, tmp_path / recipe, recipe)) for recipe in ("fp32", "int4"))
    assert found - exact == {"Shape", "Sub", "Reshape", "Cast"} - exact


def operators(package: Path) -> set[str]:
    return {node.op_type for node in onnx.load(package / VISION, load_external_data=False).graph.node}


def test_one_matrix_at_a_time_is_in_memory_as_float32(shown: list[RGB], tmp_path: Path) -> None:
    """Each is widened just before its product, whether the graph is opened as it is or as it was once optimised."""
    package = convert(CHECKPOINT, tmp_path / "package", "int4")
    optimised = package / "optimised.onnx"  # beside the weights that it names
    open_session(package / VISION, Threads(1), save_as=optimised)
    spec = read_manifest(package).spec.vision
    assert spec is not None
    for path in (package / VISION, optimised):
        ran = run_profiled(package, spec, path, shown[0])
        after = [second for first, second in pairwise(ran) if first == "Cast"]
        assert after == ["FusedMatMul"] * (4 * spec.depth + 3)


def run_profiled(package: Path, spec: VisionSpec, graph: Path, picture: RGB) -> list[str]:
    """The operators in the order in which they run."""
    session = open_session(graph, Threads(1), profile=graph.with_suffix(".profile"))
    VisionEncoder(package, spec, lambda _: session, MOST_PIXELS).encode(picture)
    events = json.loads(Path(session.end_profiling()).read_text())
    return [event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")]
