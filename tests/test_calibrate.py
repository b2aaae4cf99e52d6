"""Calibrated conversion: layers by themselves are the model, an interrupt loses nothing, and its figures are true."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import copy_checkpoint
from twins import Severity, twin

from iotd.cli import main
from iotd.convert import calibrate, convert
from iotd.convert.convert import Calibration, convert_checkpoint, convert_random, open_stack
from iotd.convert.layers import FLOAT, Layers
from iotd.convert.quality import float_logits
from iotd.model import Model

QUALITY = ("bench", "quality", "--json")
QUICK = Calibration(n_tokens=1024)
TEXTS = [np.arange(40) * 7 % 256, np.arange(23) * 11 % 256, np.array([5, 9])]


@pytest.fixture(params=["grouped", "untied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return copy_checkpoint(tmp_path / "checkpoint", request.param)


def told(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 0) -> str:
    """What `iotd` prints."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert (ended.value.code or 0) == code, said.err
    return said.out + said.err


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_layers_one_by_one_are_the_model(checkpoint: Path, tmp_path: Path) -> None:
    """In float32, for texts of unequal length: the logits behind each token are the whole decoder's."""
    convert_checkpoint(checkpoint, tmp_path / "package", recipe="fp32")
    model = Model.open(tmp_path / "package", threads=1)
    stack = open_stack(checkpoint)
    hidden = Layers(stack, TEXTS, tmp_path).hidden(FLOAT)
    found = float_logits(stack.head() or stack.embedding())(hidden)
    expected = np.concatenate([model.logits_along(model.new_state(64), text) for text in TEXTS])
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_the_figures_are_those_of_the_package_as_it_runs(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What conversion measures layer by layer is what `iotd bench quality` measures on the daemon's model."""
    made = convert_checkpoint(checkpoint, tmp_path / "package", calibration=QUICK)
    assert {one.kind for one in made.quality} >= {"prose", "sensor", "chat"}
    package = tmp_path / "package"
    figures = json.loads(told(capsys, *QUALITY, package, "--reference", checkpoint, "--tokens", "512"))
    found = {one["kind"]: one for one in figures["texts"]}
    for one in made.quality:
        assert found[one.kind]["ppl_float"] == pytest.approx(one.ppl_float, rel=0.3)
        assert found[one.kind]["kld_mean"] == pytest.approx(one.kld_mean, rel=0.5)
    assert {cost["name"].split(".")[-1] for cost in figures["matrices"]} >= {"q_proj", "down_proj", "in_proj_qkv"}
    assert all(0 < cost["noise"] < 0.1 for cost in figures["matrices"])


def test_calibration_is_nearer_to_the_original(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where channels are of unequal size, on the same held-back texts, against a float32 package."""
    checkpoint = twin(checkpoint, tmp_path / "twin", Severity(0.6, "student"))
    convert_checkpoint(checkpoint, tmp_path / "float", recipe="fp32")
    klds = []
    for name, calibration in (("plain", None), ("calibrated", QUICK)):
        convert_checkpoint(checkpoint, tmp_path / name, calibration=calibration)
        arguments = tmp_path / name, "--reference", tmp_path / "float", "--tokens", "1024"
        figures = json.loads(told(capsys, *QUALITY, *arguments))
        klds.append(np.mean([one["kld_mean"] for one in figures["texts"]]))
    assert klds[1] < 0.8 * klds[0]


@pytest.mark.parametrize(("failing", "at"), [("through", 6), ("_save", 2), ("_save", 5)])
def test_an_interrupt_loses_nothing(failing: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started again goes on, and comes to the same package, byte for byte."""
    checkpoint = copy_checkpoint(tmp_path / "checkpoint")
    convert_checkpoint(checkpoint, tmp_path / "whole", calibration=QUICK)
    calls = 0
    owner: Any = calibrate.Calibrator if failing == "_save" else Layers
    working = getattr(owner, failing)

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return working(*arguments)

    monkeypatch.setattr(owner, failing, interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(checkpoint, tmp_path / "out", calibration=QUICK)
    before = calls
    assert not (tmp_path / "out").exists()
    convert_checkpoint(checkpoint, tmp_path / "out", calibration=QUICK)
    again = calls - before
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    calls = before = -1000
    convert_checkpoint(checkpoint, tmp_path / "other", calibration=QUICK)
    assert again < calls - before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "other", "out", "whole"]


def test_what_is_left_of_another_calibration_is_not_used(tmp_path: Path) -> None:
    checkpoint = copy_checkpoint(tmp_path / "checkpoint")
    convert_checkpoint(checkpoint, tmp_path / "whole", calibration=QUICK)
    left = tmp_path / ".out-calibration"
    left.mkdir()
    (left / "plan").write_text("of another model")
    (left / "stream-4.npy").write_bytes(b"nothing")
    convert_checkpoint(checkpoint, tmp_path / "out", calibration=QUICK)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_progress_adds_up(tmp_path: Path) -> None:
    """To what was said before, so that the time left can be told."""
    told: list[int] = []
    checkpoint = copy_checkpoint(tmp_path / "checkpoint")
    convert_checkpoint(checkpoint, tmp_path / "out", calibration=QUICK, progress=told.append)
    n_elements = convert.Checkpoint(checkpoint).n_elements
    total = convert.n_steps(n_elements, "int4", QUICK)
    assert 0.8 * total < sum(told) <= total


def test_the_users_own_lines_are_heeded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They change the codes, and have figures of their own; a few are not enough."""
    lines = tmp_path / "lines.txt"
    lines.write_text("".join(f"[14:{n % 60:02}:05] Teich Pegel {n * 37 % 100} cm\n" for n in range(300)))
    checkpoint = copy_checkpoint(tmp_path / "checkpoint")
    assert "\nown " in told(capsys, "convert", checkpoint, tmp_path / "out", "--calibration", lines)
    lines.write_text("one line\n")
    said = told(capsys, "convert", checkpoint, tmp_path / "other", "--calibration", lines, code=1)
    assert "too few lines" in said
    assert not (tmp_path / "other").exists()


def test_random_weights_are_calibrated_only_where_that_is_asked_for(tmp_path: Path) -> None:
    assert not convert_random("tiny", tmp_path / "plain").recipe.calibrated
    assert convert_random("tiny", tmp_path / "calibrated", calibration=QUICK).recipe.calibrated
