"""A package's weights are packed once for a machine, and computing with them is the same."""

import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from patience import PATIENCE_S

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
    """Folders in the cache, unfinished ones included."""
    return sorted(entry for entry in (cache_folder() / "packed").iterdir() if entry.is_dir())


@pytest.mark.parametrize("package", ["tiny_package", "tiny_int4_package"])
def test_packed_weights_compute_the_same(package: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(package)
    plain, first, later = (Model.open(folder, threads=1, pack=pack) for pack in (False, True, True))
    assert len(kept()) == 3
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    for model in (first, later):
        np.testing.assert_array_equal(logits(model), logits(plain))
        np.testing.assert_array_equal(model.encode_image(image), plain.encode_image(image))
    assert len(kept()) == 3


def test_they_are_packed_once(tiny_int4_package: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(3):
        Model.open(tiny_int4_package, threads=1)
    said = [record.message for record in caplog.records]
    assert said == [
        f"packing the weights of {name}.onnx for this machine, once" for name in ("vision", "head", "decoder")
    ]


def test_other_weights_another_processor_or_version_are_packed_apart(
    tiny_package: Path, tiny_int4_package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(packed, "KEPT", 10)
    Model.open(tiny_package, threads=1)
    Model.open(tiny_int4_package, threads=1)
    (tmp_path / "cpuinfo").write_text("Features\t: fp asimd asimddp\n")
    monkeypatch.setattr(packed, "_CPUINFO", tmp_path / "cpuinfo")
    Model.open(tiny_package, threads=1)
    assert len(kept()) == 9


def test_what_was_not_used_for_longest_makes_way(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Model.open(tiny_package, threads=1)
    old = kept()[0]
    os.utime(old, (1.0, 1.0))
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
    assert "MB must be free in" in caplog.text
    assert kept() == []


def test_what_a_start_that_was_cut_off_left_is_removed(tiny_package: Path) -> None:
    unfinished = cache_folder() / "packed" / ".making-x"
    unfinished.mkdir(parents=True)
    Model.open(tiny_package, threads=1)
    assert not unfinished.exists()
    assert len(kept()) == 3


def test_old_ones_make_way_where_the_disk_is_full(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = cache_folder() / "packed" / "old"
    old.mkdir(parents=True)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda _: usage._replace(free=1000 if old.exists() else 1 << 40))
    Model.open(tiny_package, threads=1)
    assert not old.exists()
    assert len(kept()) == 3


def test_a_write_that_fails_half_way_costs_memory_and_nothing_else(
    tiny_package: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
        model = Model.open(tiny_package, threads=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "the weights stay unpacked" in caplog.text
    assert kept() == []
    assert np.isfinite(logits(model)).all()


def test_processes_that_start_together_pack_once(tiny_package: Path) -> None:
    script = (
        "import sys; from iotd.model import Model, packed; packed.LEAST_NBYTES = 1; import logging;"
        "logging.basicConfig(level=logging.INFO); Model.open(sys.argv[1], threads=1)"
    )
    command = [sys.executable, "-c", script, str(tiny_package)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = "".join(process.communicate(timeout=PATIENCE_S)[1] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert said.count("packing the weights of decoder.onnx") == 1
    assert "unpacked" not in said


def test_packed_weights_that_are_damaged_are_made_again(tiny_package: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = logits(Model.open(tiny_package, threads=1))
    for folder in kept():
        os.truncate(folder / "graph.data", 100)
    np.testing.assert_array_equal(logits(Model.open(tiny_package, threads=1)), expected)
    assert "packed weights are damaged" in caplog.text
    assert len(kept()) == 1  # the vision encoder's, which is opened with the first image
    Model.open(tiny_package, threads=1)
    assert len(kept()) == 3


def test_what_is_not_used_takes_no_memory(tiny_package: Path) -> None:
    """Opening looks at every page of the packed weights; those of a head that is not asked need not stay."""
    Model.open(tiny_package, threads=1)
    model = Model.open(tiny_package, threads=1)
    assert resident_kb() == 0
    logits(model)
    assert resident_kb() > 0


def resident_kb() -> int:
    """Of all mapped packed weights."""
    found, packed_weights = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-", line):
            packed_weights = line.endswith("graph.data")
        elif packed_weights and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found
