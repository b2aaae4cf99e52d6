"""The demo's model package: converted on first use from the checkpoint iotd brings, and kept in the user's cache."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from iotd import __version__
from iotd.convert.convert import RECIPES, convert_checkpoint
from iotd.errors import CheckpointError, PackageError
from iotd.model.package import Manifest, Recipe, read_manifest, verify

CHECKPOINT = Path(__file__).parent / "checkpoint"
RECIPE = "int4"


def demo_package(say: Callable[[str], None]) -> Path:
    """The package's folder, each file of it verified. say: told where it has to be converted first.

    Raises CheckpointError where that cannot be done.
    """
    folder = _cache() / f"demo-{__version__}-{_digest(CHECKPOINT, RECIPES[RECIPE])[:12]}"
    try:
        verify(folder, read_manifest(folder))
    except PackageError:
        say(f"Converting the demo's model into {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        _convert(folder)
    return folder


def is_demo(manifest: Manifest) -> bool:
    """Whether a package was made of the demo's checkpoint."""
    return manifest.name == CHECKPOINT.name


def _convert(folder: Path) -> None:
    try:
        convert_checkpoint(CHECKPOINT, folder, recipe=RECIPE)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; the demo's model is kept in the cache that XDG_CACHE_HOME names") from error


def _digest(checkpoint: Path, recipe: Recipe) -> str:
    """SHA-256 over the recipe, and the files of a folder and their names, in hexadecimal."""
    digest = hashlib.sha256(repr(recipe).encode())
    for path in sorted(path for path in checkpoint.iterdir() if path.is_file()):
        digest.update(f"{path.name}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iotd"
