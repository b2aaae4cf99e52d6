"""Opening a package: whatever is not as it was written is refused, and hashing happens once."""

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from iotd.errors import PackageError
from iotd.model import Model, package

UNPRIVILEGED = 65534


@pytest.fixture
def folder(tiny_package: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_package, tmp_path / "package"))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed from now on."""
    names: list[str] = []
    hash_file = package.hash_file

    def remembered(path: Path) -> package.FileEntry:
        names.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(package, "hash_file", remembered)
    return names


def refusal(folder: Path) -> str:
    with pytest.raises(PackageError) as caught:
        Model.open(folder, threads=1)
    said = str(caught.value)
    assert said and "\n" not in said
    return said


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def manifest_files(folder: Path) -> list[str]:
    return sorted(json.loads((folder / "manifest.json").read_text())["files"])


def test_every_file_is_in_the_manifest(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *manifest_files(folder)}


def test_a_package_can_be_moved(folder: Path, tmp_path: Path) -> None:
    Model.open(folder, threads=1)
    folder.rename(tmp_path / "elsewhere")
    Model.open(str(tmp_path / "elsewhere"), threads=1)


def test_a_folder_that_is_no_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("", "absent", "file"):
        said = refusal(tmp_path / name)
        assert f"{tmp_path / name} is not a model package" in said and "iotd convert" in said


def test_each_missing_file_is_named(folder: Path, tmp_path: Path) -> None:
    for name in manifest_files(folder):
        (folder / name).rename(tmp_path / name)
        assert f"{folder / name} is missing" in refusal(folder)
        (tmp_path / name).rename(folder / name)


def test_each_file_of_a_wrong_size_is_named(folder: Path) -> None:
    for name in manifest_files(folder):
        nbytes = (folder / name).stat().st_size
        os.truncate(folder / name, nbytes - 1)
        assert f"{folder / name} has {nbytes - 1} bytes, its manifest says {nbytes}" in refusal(folder)
        os.truncate(folder / name, nbytes)


def test_each_flipped_byte_is_found_by_its_hash(folder: Path) -> None:
    for name in manifest_files(folder):
        flip_a_byte(folder / name)
        assert f"{folder / name} is damaged (its SHA-256" in refusal(folder)
        flip_a_byte(folder / name)
    Model.open(folder, threads=1)


def test_files_are_hashed_once_for_an_install(folder: Path, hashed: list[str]) -> None:
    Model.open(folder, threads=1)
    assert sorted(hashed) == manifest_files(folder)
    Model.open(folder, threads=1)
    assert len(hashed) == len(manifest_files(folder))


def test_a_file_written_since_is_hashed_again(folder: Path, hashed: list[str]) -> None:
    """Even with its old size; and what was found damaged is not remembered as good."""
    Model.open(folder, threads=1)
    path = folder / "decoder.onnx.data"
    written = path.stat().st_mtime_ns
    flip_a_byte(path)
    os.utime(path, ns=(written, written + 1))
    for _ in range(2):
        hashed.clear()
        assert "decoder.onnx.data is damaged" in refusal(folder)
        assert "decoder.onnx.data" in hashed


def test_another_manifest_is_checked_again(folder: Path) -> None:
    Model.open(folder, threads=1)
    edit(folder, lambda manifest: manifest["files"]["chat.json"].update(sha256="0" * 64))
    assert "chat.json is damaged" in refusal(folder)


def test_another_format_is_refused_whatever_else_it_holds(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 99, "files": "somewhere"}')
    assert "package format 99, this iotd reads 2 and 3;" in refusal(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b'{"format": "one"}', b'{"format": 2}', b'{"format": 2, "name": "\xff"}']
)
def test_a_damaged_manifest_is_refused(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    assert "manifest.json is damaged" in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("embedding"),
        lambda manifest: manifest["spec"].update(hidden_size="wide"),
        lambda manifest: manifest["spec"].update(layers=["mamba"]),
        lambda manifest: manifest["embedding"].update(bits=5),
        lambda manifest: manifest["files"].pop("vision.onnx"),
        lambda manifest: manifest["files"].pop("tokenizer.bin"),
        lambda manifest: manifest["files"].clear(),
    ],
)
def test_a_manifest_with_something_missing_or_wrong_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    edit(folder, change)
    assert "manifest.json is damaged" in refusal(folder)


def test_a_manifest_with_keys_of_a_later_version_is_read(folder: Path) -> None:
    edit(folder, lambda manifest: manifest.update(later="yes"))
    Model.open(folder, threads=1)


def test_a_graph_that_onnxruntime_does_not_know_is_refused(folder: Path) -> None:
    (folder / "decoder.onnx").write_bytes(b"no graph")
    entry = package.hash_file(folder / "decoder.onnx")
    edit(folder, lambda manifest: manifest["files"].update({"decoder.onnx": {"sha256": entry.sha256, "nbytes": 8}}))
    assert "cannot open" in refusal(folder)


def test_a_cache_that_cannot_be_written_is_no_error(
    folder: Path, tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start hashes again, then."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        Model.open(folder, threads=1)
    assert len(hashed) == 2 * len(manifest_files(folder))


def test_a_cache_that_cannot_be_read_is_no_error(
    folder: Path, tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(locked / "cache"))
    manifest = package.read_manifest(folder)
    with unprivileged(tmp_path):
        locked.chmod(0)
        try:
            package.verify(folder, manifest)
        finally:
            locked.chmod(0o700)
    assert len(hashed) == len(manifest_files(folder))


def test_a_file_that_may_not_be_read_is_refused(folder: Path, tmp_path: Path) -> None:
    manifest = package.read_manifest(folder)
    (folder / "chat.json").chmod(0)
    with unprivileged(tmp_path), pytest.raises(PackageError, match=r"cannot read .*chat\.json: Permission denied"):
        package.verify(folder, manifest)


@contextmanager
def unprivileged(folder: Path) -> Iterator[None]:
    """Not as root, for whom every file is open; what is below `folder` is handed over, and the way there opened."""
    if os.geteuid() != 0:
        yield
        return
    for path in (folder, *folder.rglob("*")):
        os.chown(path, UNPRIVILEGED, UNPRIVILEGED)
    way = stat.S_IXOTH | stat.S_IXGRP  # the group is still root's
    modes = {above: stat.S_IMODE(above.stat().st_mode) for above in folder.parents}
    closed = {above: mode for above, mode in modes.items() if mode & way != way}
    for above, mode in closed.items():
        above.chmod(mode | way)
    os.seteuid(UNPRIVILEGED)
    try:
        yield
    finally:
        os.seteuid(0)
        for above, mode in closed.items():
            above.chmod(mode)


def test_the_cache_is_where_systemd_says(
    folder: Path, tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", f"{tmp_path / 'service'}:{tmp_path / 'other'}")
    for _ in range(2):
        Model.open(folder, threads=1)
    assert len(hashed) == len(manifest_files(folder))
    assert len(list((tmp_path / "service").iterdir())) == 1


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "vocab_size"), 10**9),
        (("spec", "vocab_size"), -1),
        (("spec", "hidden_size"), 128),
        (("spec", "rotary_dim"), 8),
        (("embedding", "codes_offset"), 10**12),
        (("embedding", "block"), 0),
    ],
)
def test_a_manifest_that_does_not_fit_its_files_is_refused(
    tiny_int4_package: Path, tmp_path: Path, path: tuple[str, str], value: int
) -> None:
    """Whatever number is damaged, opening the package ends in a PackageError and never in a crash."""
    folder = tmp_path / "package"
    shutil.copytree(tiny_int4_package, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[path[0]][path[1]] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PackageError, match="convert"):
        Model.open(folder)
