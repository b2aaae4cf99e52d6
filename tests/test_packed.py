"""A package's weights are packed once for a machine, and computing with them is the same."""

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from iotd.model import Model, packed
from iotd.model.package import cache_folder

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(autouse=True)
def _however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LEAST_NBYTES", 1)


def logits(model: Model) -> np.ndarray:
    state = model.new_state(64)
    model.prefill(state, IDS, logits=False)
    return model.step(state, 7).copy()


def kept() -> list[Path]:
    return sorted((cache_folder() / "packed").iterdir())


@pytest.mark.parametrize("package", ["tiny_package", "tiny_int4_package"])
def test_packed_weights_compute_the_same(package: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(package)
    plain, first, later = (Model.open(folder, threads=1, pack=pack) for pack in (False, True, True))
    assert len(kept()) == 1
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    for model in (first, later):
        np.testing.assert_array_equal(logits(model), logits(plain))
        np.testing.assert_array_equal(model.encode_image(image), plain.encode_image(image))
    assert len(kept()) == 2


def test_they_are_packed_once(tiny_int4_package: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(3):
        Model.open(tiny_int4_package, threads=1)
    assert [record.message for record in caplog.records] == [
        "packing the weights of decoder.onnx for this machine, once"
    ]


def test_other_weights_another_processor_or_version_are_packed_apart(
    tiny_package: Path, tiny_int4_package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Model.open(tiny_package, threads=1)
    Model.open(tiny_int4_package, threads=1)
    (tmp_path / "cpuinfo").write_text("Features\t: fp asimd asimddp\n")
    monkeypatch.setattr(packed, "_CPUINFO", tmp_path / "cpuinfo")
    Model.open(tiny_package, threads=1)
    assert len(kept()) == 3


def test_what_was_not_used_for_longest_makes_way(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Model.open(tiny_package, threads=1)
    old = kept()[0]
    os.utime(old, (1.0, 1.0))
    cut_off = cache_folder() / "packed" / ".making-x"
    cut_off.mkdir()
    os.utime(cut_off, (2.0, 2.0))
    monkeypatch.setattr(packed, "KEPT", 1)
    monkeypatch.setattr(packed.platform, "machine", lambda: "another")
    Model.open(tiny_package, threads=1)
    assert old not in kept()
    assert len(kept()) == 1


def test_a_cache_that_cannot_be_written_costs_memory_and_nothing_else(
    tiny_package: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache_folder().parent.mkdir(parents=True, exist_ok=True)
    cache_folder().write_text("a file where the folder should be")
    model = Model.open(tiny_package, threads=1)
    np.testing.assert_array_equal(logits(model), logits(Model.open(tiny_package, threads=1, pack=False)))
    assert "the weights stay unpacked, which takes twice the memory" in caplog.text


def test_a_full_disk_is_not_filled(
    tiny_package: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda _: usage)
    Model.open(tiny_package, threads=1)
    assert "MB must be free, once" in caplog.text
    assert kept() == []


def test_packed_weights_that_are_damaged_are_made_again(tiny_package: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = logits(Model.open(tiny_package, threads=1))
    (data,) = kept()[0].glob("*.data")
    os.truncate(data, 100)
    np.testing.assert_array_equal(logits(Model.open(tiny_package, threads=1)), expected)
    assert "packed weights are damaged" in caplog.text
    assert kept() == []
    Model.open(tiny_package, threads=1)
    assert len(kept()) == 1
