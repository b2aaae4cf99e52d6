"""Small things about files that several parts need. Knows no other part of iotd."""

import os
from pathlib import Path


def lines(path: Path) -> list[str]:
    """Of a text file; none where it is not there or cannot be read."""
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def put(unfinished: Path, path: Path) -> None:
    """Replace a file by one written beside it: after a crash at any moment it is the old or the new. Raises OSError."""
    sync(unfinished)
    unfinished.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, onto the disk: a power cut then leaves them there. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
