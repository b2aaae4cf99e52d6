"""The context's snapshot on disk: one file, replaced as a whole, whose every byte is covered by a checksum.

It is an uncompressed NumPy archive (a zip file, so each array has its CRC-32) with the header as JSON beside the
arrays. Knows no engine: what a snapshot means is `iotd.engine.snapshot`'s.
"""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from iotd.engine.snapshot import Header, Snapshot
from iotd.errors import SnapshotError
from iotd.files import put

_HEADER = "header"


@dataclass(frozen=True, slots=True)
class Description:
    """What a snapshot says of itself, read without its arrays."""

    nbytes: int
    saved_s: float
    """When it was written, seconds since the Unix epoch."""
    tokens: int
    events: int
    """Kept for the next successor."""
    oldest_s: float
    """Unix time of the oldest event in the context; 0 where it holds none."""
    newest_s: float
    window: int
    model: str
    """Fingerprint of the model package."""


def save(path: Path, snapshot: Snapshot) -> None:
    """Replace the file: after a crash at any moment it is the old one or the new one. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    header = np.frombuffer(msgspec.json.encode(snapshot.header), np.uint8)
    arrays: dict[str, Any] = {_HEADER: header, **snapshot.arrays}
    with unfinished.open("wb") as file:
        np.savez(file, **arrays)
    put(unfinished, path)


def load(path: Path) -> Snapshot | None:
    """The whole snapshot, every checksum verified; None where there is none. Raises SnapshotError."""
    try:
        with _opened(path) as archive:
            arrays = {name: archive[name] for name in archive.files}
            return Snapshot(_decoded(arrays.pop(_HEADER)), arrays)
    except FileNotFoundError:
        return None


def describe(path: Path) -> Description | None:
    """What a snapshot says of itself; None where there is none. Raises SnapshotError."""
    try:
        with _opened(path) as archive:
            stat, header = path.stat(), _decoded(archive[_HEADER])
    except FileNotFoundError:
        return None
    return Description(
        nbytes=stat.st_size,
        saved_s=stat.st_mtime,
        tokens=header.live.position,
        events=len(header.entries),
        oldest_s=header.oldest_s,
        newest_s=header.entries[-1].time_s if header.entries else 0.0,
        window=header.key.window,
        model=header.key.model,
    )


def clear(path: Path) -> bool:
    """Remove the snapshot, and what an interrupted save left. False where there was none. Raises OSError."""
    path.with_name(f"{path.name}.part").unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        path.unlink()
        return True
    return False


_DAMAGE = (
    *(OSError, ValueError, TypeError, KeyError, EOFError, NotImplementedError, MemoryError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What NumPy and zipfile raise for a file that is none of theirs, cut off, or altered. msgspec's are ValueErrors."""


def _decoded(header: np.ndarray) -> Header:
    return msgspec.json.decode(header.tobytes(), type=Header)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The archive, while it is read. Raises FileNotFoundError, and SnapshotError for what is wrong with the file."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            yield archive
    except FileNotFoundError:
        raise
    except _DAMAGE as error:
        raise SnapshotError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
