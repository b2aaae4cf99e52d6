"""Where a package is written: beside its place, which it takes in one rename, so that none is ever half done."""

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from iotd.errors import CheckpointError
from iotd.model.package import MANIFEST


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A folder next to `out` that takes its place if all goes well and leaves no trace otherwise.

    Raises CheckpointError where `out` is something else than an older package, and where there is no space left.
    """
    out = out.resolve()
    if not _may_replace(out):
        raise CheckpointError(f"{out} exists and is no model package: choose another place or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write beside {out}: {error.strerror}") from error
    try:
        yield folder
        folder.chmod(0o755)
        _replace(out, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"no space left for {out}: free some and convert again") from error
        raise CheckpointError(f"cannot write {out}: {error.strerror}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def work_folder(out: Path, plan: str) -> Iterator[Path]:
    """A folder next to `out` for what takes long to compute: it outlives an interrupt, and is removed at the end.

    plan: names what is computed; of another plan nothing is kept.
    """
    out = out.resolve()
    folder = out.with_name(f".{out.name}-calibration")
    marker = folder / "plan"
    if not marker.exists() or marker.read_text() != plan:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        marker.write_text(plan)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _may_replace(out: Path) -> bool:
    """Nothing is there, or an empty folder, or a package with no other files in it."""
    if not out.exists():
        return True
    if not out.is_dir():
        return False
    names = {path.name for path in out.iterdir()}
    files = _package_files(out)
    return not names or (bool(files) and names <= {MANIFEST, *files})


def _package_files(folder: Path) -> set[str]:
    """The files that the manifest of a package lists, of whatever format it is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        return set(manifest["files"]) if str(manifest["tool"]).startswith("iotd ") else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _replace(out: Path, folder: Path) -> None:
    """Put `folder` at `out`; an older package steps aside first, and comes back if that fails."""
    if not out.exists():
        folder.rename(out)
        return
    old = folder.with_name(folder.name + ".old")
    out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
