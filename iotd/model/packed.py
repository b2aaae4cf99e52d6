"""Weights as this machine's kernels want them: packed once, kept in the cache, mapped into memory at every later start.

onnxruntime otherwise packs them anew at each start, into anonymous memory beside what it has read. Packed on disk they
are file pages, which the kernel can drop and read again, and loading takes a quarter of the time. The computation is
the same, bit for bit.
"""

import hashlib
import logging
import os
import platform
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp

import onnxruntime as ort

from iotd.errors import PackageError
from iotd.model.package import cache_folder
from iotd.model.session import open_session

log = logging.getLogger(__name__)

LEAST_NBYTES = 32 << 20
"""Of a graph's data: below, packing at each start costs nothing that anybody would notice."""
KEPT = 4
"""Packed graphs, those used last: a decoder and a vision encoder each of two packages."""
_GROWTH = 2
"""The file holds the weights as they were, too."""
_GRAPH = "graph.onnx"
_DATA = "graph.data"
_CPUINFO = Path("/proc/cpuinfo")


def open_packed(path: Path, threads: int, fingerprint: str) -> ort.InferenceSession:
    """Open a package's graph in its packed form, which is made if it is not there; as it is where that cannot be.

    fingerprint: of the package. Raises PackageError as `open_session` does.
    """
    data = path.with_name(f"{path.name}.data")
    if not data.exists() or data.stat().st_size < LEAST_NBYTES:
        return open_session(path, threads)
    folder = cache_folder() / "packed" / _key(path.name, fingerprint)
    try:
        if not folder.exists():
            _pack(path, folder, threads, data.stat().st_size)
        os.utime(folder)
    except OSError as error:
        log.warning("the weights stay unpacked, which takes twice the memory: %s: %s", folder.parent, error.strerror)
        return open_session(path, threads)
    try:
        return open_session(folder / _GRAPH, threads)
    except PackageError as error:
        log.warning("packed weights are damaged and will be made again at the next start: %s", error)
        shutil.rmtree(folder, ignore_errors=True)
        return open_session(path, threads)


def _pack(path: Path, folder: Path, threads: int, nbytes: int) -> None:
    """Write the packed graph, all of it or nothing. Raises OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder.parent).free < (_GROWTH + 1) * nbytes:
        raise OSError(0, f"{(_GROWTH + 1) * nbytes / 1e6:.0f} MB must be free, once")
    log.info("packing the weights of %s for this machine, once", path.name)
    making = Path(mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        open_session(
            path,
            threads,
            save_as=making / _GRAPH,
            entries={
                "session.optimized_model_external_initializers_file_name": _DATA,
                "session.save_external_prepacked_constant_initializers": "1",
            },
        )
        for written in (making / _DATA, making / _GRAPH, making):
            _sync(written)
        with suppress(FileExistsError):  # another process has made it meanwhile
            making.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    for old in sorted(folder.parent.iterdir(), key=lambda entry: entry.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _key(name: str, fingerprint: str) -> str:
    """What the layout depends on: the weights, onnxruntime's version, and what the processor can do."""
    abilities = {line for line in _lines(_CPUINFO) if line.startswith(("flags", "Features", "CPU part", "model name"))}
    parts = (name, fingerprint, ort.__version__, platform.machine(), *sorted(abilities))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _sync(path: Path) -> None:
    """Onto the disk, so that a power cut leaves no name without its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
