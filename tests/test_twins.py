"""Twins of a checkpoint compute what it computes, and int4 keeps their answers however far their channels lie apart.

`pytest -m heavy tests/test_twins.py` asks twins the demo's held-out questions, minutes each. With IOTD_SHARED, the
folder that holds the hidden states of a real model, the channels of twins are held against those.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from checkpoints import GOLDEN
from numpy.typing import NDArray
from twins import Severity, twin

from iotd.convert.convert import THOROUGH, convert_checkpoint
from iotd.demo.evaluate import Outcome, ask
from iotd.demo.package import CHECKPOINT
from iotd.demo.respondents import PackageRespondent
from iotd.model import Model
from iotd.model.decoder import rotary_tables
from iotd.model.package import DECODER, Manifest, read_manifest

SHARED = os.environ.get("IOTD_SHARED")
QUESTIONS = int(os.environ.get("IOTD_TWIN_QUESTIONS", "2000"))
IDS = np.random.default_rng(0).integers(0, 256, 100)
MODERATE, SEVERE, STRAY = Severity(0.3), Severity(0.6), Severity(0.6, "student")
NORMAL_LOG_VARIANCE = np.pi**2 / 8
"""Of the logarithm of a normal value's size."""
Floats = NDArray[np.float32]


def convert(checkpoint: Path, out: Path, recipe: str = "fp32") -> Path:
    convert_checkpoint(checkpoint, out, recipe=recipe, calibration=THOROUGH)
    return out


def logits(package: Path) -> Floats:
    """After a run of tokens and after one more, float32 [2, V]."""
    model = Model.open(package, threads=1)
    state = model.new_state(len(IDS) + 1)
    return np.stack([model.prefill(state, IDS), model.step(state, 7)])


def outcomes(package: Path, n_questions: int) -> list[Outcome]:
    with PackageRespondent(package, threads=1) as respondent:
        return list(ask(respondent, n_questions))


@pytest.mark.parametrize("source", [CHECKPOINT, GOLDEN / "grouped", GOLDEN / "untied"], ids=lambda path: path.name)
@pytest.mark.parametrize("severity", [Severity(0), SEVERE, STRAY], ids=str)
def test_a_twin_computes_what_its_checkpoint_computes(source: Path, severity: Severity, tmp_path: Path) -> None:
    """To the rounding of float32, with heads shared between values and with a head of its own."""
    expected = logits(convert(source, tmp_path / "package"))
    found = logits(convert(twin(source, tmp_path / "checkpoint", severity), tmp_path / "twin"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_a_twin_gives_the_same_answers(tmp_path: Path) -> None:
    """About pictures, too, whose tokens come into the text model's channels."""
    expected = outcomes(convert(CHECKPOINT, tmp_path / "package"), 30)
    found = outcomes(convert(twin(CHECKPOINT, tmp_path / "checkpoint", SEVERE), tmp_path / "twin"), 30)
    assert [outcome.answer for outcome in found] == [outcome.answer for outcome in expected]
    assert any(outcome.kind.startswith("camera") for outcome in found)


def norm_fed(package: Path) -> Floats:
    """What the matrices behind the norms of a float32 package read, float32 [norms, T, D]."""
    manifest = read_manifest(package)
    graph = onnx.load(package / DECODER, load_external_data=False)
    norms = [node for node in graph.graph.node if "LayerNormalization" in node.op_type]
    names = [node.output[0] for node in norms if any("layernorm" in name for name in node.input)]
    graph.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in names)
    tapped = package / "tapped.onnx"
    onnx.save(graph, tapped)
    found: Floats = np.concatenate(ort.InferenceSession(tapped).run(names, feeds(package, manifest)))
    return found


def feeds(package: Path, manifest: Manifest) -> dict[str, NDArray[Any]]:
    """Of a float32 package's decoder, to read IDS from an empty state."""
    spec, n = manifest.spec, len(IDS)
    table = np.memmap(package / manifest.embedding.file, np.float32, "r", manifest.embedding.codes_offset)
    cos, sin = rotary_tables(spec, n)
    inputs = {
        "inputs_embeds": table[: spec.vocab_size * spec.hidden_size].reshape(-1, spec.hidden_size)[IDS][None],
        "position_ids": np.tile(np.arange(n), (3, 1, 1)),
        "hidden_rows": np.zeros(0, np.int64),
        "last_position": np.array([n - 1], np.int32),
        "total_positions": np.array([n], np.int32),
        "cos_table": cos,
        "sin_table": sin,
    }
    states = {f"past.{name}": np.zeros(shape, np.float32) for name, shape in spec.state_shapes(n).items()}
    return inputs | states


def channels(tmp_path: Path, severity: Severity) -> Floats:
    name = f"{severity.tail}-{severity.sigma}"
    return norm_fed(convert(twin(CHECKPOINT, tmp_path / name, severity), tmp_path / f"{name}-package"))


@pytest.mark.parametrize("severity", [MODERATE, SEVERE], ids=str)
def test_channels_of_a_twin_lie_as_far_apart_as_its_severity_says(severity: Severity, tmp_path: Path) -> None:
    """By their mean squares, beyond what lies between the channels of the checkpoint itself."""

    def variance(values: Floats) -> float:
        return float(np.log((values**2).mean(axis=1)).var(axis=1).mean() / 4)

    added = variance(channels(tmp_path, severity)) - variance(channels(tmp_path, Severity(0)))
    assert added == pytest.approx(severity.sigma**2, rel=0.15)


def spread(values: Floats) -> float:
    """Of one token's channels [..., D], the standard deviation of log sizes beyond a normal's; median over the rest."""
    logs = np.log(np.abs(values) + np.float32(1e-12))
    logs = np.clip(logs, np.median(logs, axis=-1, keepdims=True) - 6, None)  # zeros, as bfloat16 has them
    return float(np.sqrt(max(0.0, np.median(logs.var(axis=-1)) - NORMAL_LOG_VARIANCE)))


def tail(values: Floats) -> float:
    """Of one token's channels [..., D], the 99th percentile of sizes over their median; median over the rest."""
    sizes = np.abs(values)
    return float(np.median(np.quantile(sizes, 0.99, axis=-1) / np.median(sizes, axis=-1)))


@pytest.mark.skipif(SHARED is None, reason="IOTD_SHARED names no folder")
def test_the_channels_of_a_real_model_lie_between_those_of_twins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Indicative only: one token at position 0, before the norms, of which the last one's weight alone is known."""
    folder = Path(SHARED or "") / "real" / "hidden"
    real = np.stack([np.fromfile(folder / f"hidden_{i}.bin", np.float32) for i in range(1, 25)])
    last_norm = 1 + np.fromfile(folder / "final_norm_weight.bin", np.float32)
    plain, moderate, severe = (channels(tmp_path, severity) for severity in (Severity(0), MODERATE, SEVERE))
    rows = {"real": real, "real, after its last norm": real[-1] * last_norm}
    rows |= {"as it is": plain, "σ 0.3": moderate, "σ 0.6": severe}
    with capsys.disabled():
        for name, values in rows.items():
            sys.stdout.write(f"\n  {name}: spread {spread(values):.2f}, tail {tail(values):.1f}")
        sys.stdout.write(f"\n  last norm of the real model: spread {np.log(last_norm).std():.2f}\n")
    assert spread(plain) < spread(real) < spread(severe)
    assert tail(plain) < tail(moderate) < tail(real) < tail(severe)


@pytest.mark.heavy
@pytest.mark.parametrize("severity", [None, MODERATE, SEVERE, STRAY], ids=str)
def test_int4_keeps_the_answers_of_twins(
    severity: Severity | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within one point of float32, of 2,000 questions (IOTD_TWIN_QUESTIONS) that are the same for both."""
    checkpoint = CHECKPOINT if severity is None else twin(CHECKPOINT, tmp_path / "checkpoint", severity)
    exact, rounded = (
        outcomes(convert(checkpoint, tmp_path / recipe, recipe), QUESTIONS) for recipe in ("fp32", "int4")
    )
    pairs = [(one.right, other.right) for one, other in zip(exact, rounded, strict=True)]
    lost, won = pairs.count((True, False)), pairs.count((False, True))
    right = [sum(outcome.right for outcome in found) / QUESTIONS for found in (exact, rounded)]
    with capsys.disabled():
        figures = f"fp32 {right[0]:.2%}, int4 {right[1]:.2%}: {lost} right only in fp32, {won} only in int4"
        sys.stdout.write(f"\n  {severity or 'as it is'}, of {QUESTIONS}: {figures}\n")
    assert lost - won <= QUESTIONS / 100
