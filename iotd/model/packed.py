"""Weights as this machine's kernels want them: packed once, kept in the cache, mapped into memory at every later start.

onnxruntime otherwise packs them anew at each start, into anonymous memory beside what it has read. Packed on disk they
are file pages, which the kernel can drop and read again, and loading takes a quarter of the time. The computation is
the same, bit for bit.
"""

import ctypes
import fcntl
import hashlib
import logging
import mmap
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

import onnxruntime as ort

from iotd.errors import PackageError
from iotd.files import lines, sync
from iotd.model.package import cache_folder
from iotd.model.session import Threads, open_session

log = logging.getLogger(__name__)

LEAST_NBYTES = 8 << 20
"""Of a graph's data: below, packing at each start costs nothing that anybody would notice."""
KEPT = 8
"""Packed graphs, those used last: a decoder, two heads and a vision encoder each of two packages."""
SPACE = 3
"""Times the graph's data that must be free: the packed file holds the weights as they were, too."""
_LAYOUT = 1
"""To be raised with whatever changes how graphs are optimised here."""
_GRAPH = "graph.onnx"
_DATA = "graph.data"
_CPUINFO = Path("/proc/cpuinfo")


def open_packed(path: Path, threads: Threads, fingerprint: str) -> ort.InferenceSession:
    """Open a package's graph in its packed form, which is made if it is not there; as it is where that cannot be.

    fingerprint: of the package. Raises PackageError as `open_session` does.
    """
    packed = pack(path, threads, fingerprint)
    if packed is None:
        return open_session(path, threads)
    try:
        session = open_session(packed, threads)
        _let_go(packed.with_name(_DATA))
        return session
    except PackageError as error:
        log.warning("packed weights are damaged and will be made again at the next start: %s", error)
        shutil.rmtree(packed.parent, ignore_errors=True)
        return open_session(path, threads)


def pack(path: Path, threads: Threads, fingerprint: str) -> Path | None:
    """Make the packed form of a graph, if it is not there.

    Returns where it is; None where it is not worth it, or cannot be made, which is then logged.
    """
    data = path.with_name(f"{path.name}.data")
    if not data.exists() or data.stat().st_size < LEAST_NBYTES:
        return None
    folder = cache_folder() / "packed" / machine_key(f"{_LAYOUT} {path.name}", fingerprint)
    try:
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _alone(folder.parent):
                _make(path, folder, threads, data.stat().st_size)
    except (OSError, PackageError) as error:
        log.warning("the weights stay unpacked, which takes twice the memory: %s", error)
        return None
    with suppress(OSError):  # a cache that can only be read serves as well
        os.utime(folder)
    return folder / _GRAPH


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """No other process packs meanwhile; what one has left half made is removed."""
    with (place / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for unfinished in place.glob(".making-*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        yield


def _make(path: Path, folder: Path, threads: Threads, nbytes: int) -> None:
    """Write the packed graph, all of it or nothing. Raises OSError or PackageError."""
    if folder.exists():  # another process has made it while this one waited
        return
    place = folder.parent
    kept = sorted((entry for entry in place.iterdir() if entry.is_dir()), key=lambda entry: entry.stat().st_mtime)
    while kept and (len(kept) >= KEPT or shutil.disk_usage(place).free < SPACE * nbytes):
        shutil.rmtree(kept.pop(0), ignore_errors=True)
    if shutil.disk_usage(place).free < SPACE * nbytes:
        raise OSError(f"{SPACE * nbytes / 1e6:.0f} MB must be free in {place}, once")
    log.info("packing the weights of %s for this machine, once", path.name)
    making = Path(mkdtemp(prefix=".making-", dir=place))
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
            sync(written)
        making.rename(folder)
        sync(place)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _let_go(data: Path) -> None:
    """Pages that were looked at while the graph was opened: what is used comes back, the rest takes no memory."""
    start = stop = 0
    for line in lines(Path("/proc/self/smaps")):
        if not line[0].isupper():  # the line that a mapping begins with
            addresses = line.partition(" ")[0] if line.endswith(f" {data}") else "0-0"
            start, stop = (int(address, 16) for address in addresses.split("-"))
        elif stop and line.startswith("Anonymous:") and line.split()[1] == "0":  # nothing written would be lost
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


def machine_key(*parts: str) -> str:
    """Of these parts, and of what computing depends on besides: onnxruntime's version, what the processor can do."""
    abilities = {line for line in lines(_CPUINFO) if line.startswith(("flags", "Features", "CPU part", "model name"))}
    return hashlib.sha256(
        "\n".join((*parts, ort.__version__, platform.machine(), *sorted(abilities))).encode()
    ).hexdigest()[:32]
