"""iotd's model against transformers' own Qwen3.5, on random checkpoints of awkward shape."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="install the oracle extra")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

import make_golden  # noqa: E402 - needs torch, which may be missing
import oracle_checkpoints as oracle  # noqa: E402
from divergence import divergence  # noqa: E402

from iotd.convert.convert import convert_checkpoint  # noqa: E402
from iotd.events import Labels  # noqa: E402
from iotd.model import Model  # noqa: E402

LOGITS_TOLERANCE = 2e-4
VISION_TOLERANCE = 1e-3
N_TOKENS, N_PREFILL = 150, 86  # leaves 64 steps


@dataclass
class Case:
    shape: oracle.Shape
    network: Any
    checkpoint: Path
    model: Model
    ids: NDArray[np.int64]
    logits: NDArray[np.float32]


@pytest.fixture(scope="module", params=oracle.SHAPES, ids=lambda shape: shape.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    shape = request.param
    folder = tmp_path_factory.mktemp(shape.name)
    network = oracle.make(shape)
    oracle.save(network, shape, folder / "checkpoint")
    convert_checkpoint(folder / "checkpoint", folder / "package", recipe="fp32")
    ids = np.random.default_rng(shape.seed).integers(0, 256, N_TOKENS)
    logits = oracle.reference_logits(network, ids)
    yield Case(shape, network, folder / "checkpoint", Model.open(folder / "package"), ids, logits)


def test_prefill_agrees(case: Case) -> None:
    """Logits after a prefill are those of transformers."""
    state = case.model.new_state(N_TOKENS)
    assert_close(case.model.prefill(state, case.ids), case.logits[-1])


def test_steps_agree(case: Case) -> None:
    """64 steps after a prefill give transformers' logits, each of them."""
    state = case.model.new_state(N_TOKENS)
    case.model.prefill(state, case.ids[:N_PREFILL], logits=False)
    for at in range(N_PREFILL, N_TOKENS):
        assert_close(case.model.step(state, int(case.ids[at])), case.logits[at])


@pytest.mark.parametrize("seed", range(4))
def test_any_chunking_agrees(case: Case, seed: int) -> None:
    """However the prompt is cut into chunks, the logits after each chunk are those of transformers."""
    state = case.model.new_state(N_TOKENS)
    random = np.random.default_rng(seed)
    while state.position < N_TOKENS:
        size = int(random.choice([1, 2, 3, 5, 17, 40]))
        logits = case.model.prefill(state, case.ids[state.position :][:size])
        assert_close(logits, case.logits[state.position - 1])


def test_greedy_text_is_identical(case: Case) -> None:
    """The most likely continuation is the same text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(case.checkpoint / "tokenizer.json"))
    prompt = "<|im_start|>user\nHow warm is it?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    inputs = torch.tensor([tokenizer.encode(prompt).ids])
    with torch.no_grad():
        found = case.network.generate(inputs, max_new_tokens=48, do_sample=False, pad_token_id=0)
    expected = tokenizer.decode(found[0, inputs.shape[1] :].tolist())
    messages = [{"role": "user", "content": "How warm is it?"}]
    pieces = list(case.model.generate(messages, max_tokens=48, temperature=0, presence_penalty=0))
    assert "".join(pieces) == expected


def test_label_probabilities_agree(case: Case) -> None:
    """Log probabilities of labels of one token and of several, with shared beginnings, are transformers'."""
    labels = Labels(("y", "yes", "yes, it is warm", "no"), length_normalized=True)
    paths = case.model.label_paths(labels.texts)
    state = case.model.new_state(N_TOKENS + 32)
    logits = case.model.prefill(state, case.ids, only=case.model.every_token)
    weighing = case.model.weighing(state, logits, labels, paths)
    while not weighing.done:
        weighing.step()
    for path, score in zip(paths, weighing.result().labels, strict=True):
        inputs = torch.tensor([[*case.ids.tolist(), *path]])
        with torch.no_grad():
            log_p = case.network(inputs).logits[0].log_softmax(-1)
        expected = [log_p[N_TOKENS - 1 + n, token].item() for n, token in enumerate(path)]
        assert score.log_probability == pytest.approx(np.mean(expected), abs=LOGITS_TOLERANCE)


@pytest.mark.parametrize(("height", "width"), [(40, 24), (101, 77), (13, 60), (300, 200)])
def test_images_agree(case: Case, height: int, width: int) -> None:
    """Resizing, vision embeddings and logits behind an image are those of transformers' processor and model."""
    if case.shape.vision is None:
        pytest.skip("a text-only checkpoint")
    rgb = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    before, after = [1, 2, 3], [4, 5, 6, 7]
    inputs = oracle.image_inputs(case.network, case.shape, rgb, before, after)
    with torch.no_grad():
        features = case.network.model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"]
        ).pooler_output[0]
        expected = case.network(**inputs).logits[0, -1].numpy()
    embeddings, grid = case.model.encode_image(rgb), case.model.image_grid(rgb.shape)
    assert grid == tuple(inputs["image_grid_thw"][0].tolist())
    np.testing.assert_allclose(embeddings, features.numpy(), atol=VISION_TOLERANCE, rtol=0)
    state = case.model.new_state(1024)
    case.model.prefill(state, before, logits=False)
    case.model.prefill_embeddings(state, embeddings, grid=grid)
    assert_close(case.model.prefill(state, after), expected)


def test_int4_differs_only_by_int8_activations(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An int4 package is as far from float32 as transformers with the dequantised weights, but for the activations."""
    convert_checkpoint(case.checkpoint, tmp_path / "int4", recipe="int4")
    model = Model.open(tmp_path / "int4")
    state = model.new_state(N_TOKENS)
    ours = np.stack([model.step(state, int(token)).copy() for token in case.ids])
    rounded = oracle.make(case.shape)
    oracle.round_weights(rounded)
    theirs = oracle.reference_logits(rounded, case.ids)
    of_ours, of_theirs, between = (
        divergence(case.logits, ours),
        divergence(case.logits, theirs),
        divergence(theirs, ours),
    )
    with capsys.disabled():
        sys.stdout.write(
            f"\n  {case.shape.name}: KL to fp32: int4 {of_ours:.4f}, dequantised {of_theirs:.4f}; apart {between:.4f}\n"
        )
    assert between < 0.25 * of_theirs


def assert_close(found: NDArray[np.float32] | None, expected: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(found, expected, atol=LOGITS_TOLERANCE, rtol=0)


@pytest.mark.parametrize("shape", oracle.GOLDEN, ids=lambda shape: shape.name)
def test_golden_files_are_current(shape: oracle.Shape, tmp_path: Path) -> None:
    """tests/golden is what make_golden.py writes."""
    make_golden.write(shape, tmp_path)
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        written = [json.loads((folder / name).read_text()) for folder in (tmp_path, make_golden.GOLDEN / shape.name)]
        for found in written:
            found.pop("transformers_version", None)
        assert written[0] == written[1]
    with np.load(tmp_path / "expected.npz") as new, np.load(make_golden.GOLDEN / shape.name / "expected.npz") as old:
        assert set(new) == set(old)
        for name in new:
            np.testing.assert_allclose(new[name], old[name], atol=LOGITS_TOLERANCE / 2, rtol=0)
