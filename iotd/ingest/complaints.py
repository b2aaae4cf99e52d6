"""What libjpeg and libpng print about a damaged image, caught before it reaches the log.

Both write to file descriptor 2 itself, and OpenCV offers no other way. Knows no image.
"""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

STDERR = 2

# The texts of libjpeg's jerror.h that are warnings, and libpng's default handlers.
_COMPLAINT = re.compile(
    rb"Corrupt JPEG data|Premature end of JPEG|Invalid SOS parameters|Inconsistent progression"
    rb"|Unknown Adobe color|Warning: unknown JFIF|libpng (error|warning)"
)
_lock = threading.Lock()


@contextmanager
def caught() -> Iterator[list[str]]:
    """A list that holds, after the block, what the decoders printed inside of it; one block at a time.

    Lines that other threads wrote to standard error meanwhile are written there afterwards. They wait in memory and not
    in a pipe: nobody has to read while the block runs.
    """
    complaints: list[str] = []
    with _lock, os.fdopen(os.memfd_create("iotd-stderr"), "r+b") as aside:
        stderr = os.dup(STDERR)
        os.dup2(aside.fileno(), STDERR)
        try:
            yield complaints
        finally:
            os.dup2(stderr, STDERR)
            os.close(stderr)
            _sort_out(aside, complaints)


def _sort_out(written: BinaryIO, complaints: list[str]) -> None:
    written.seek(0)
    for line in written:
        if _COMPLAINT.match(line):
            complaints.append(line.decode(errors="replace").strip())
        else:
            with suppress(OSError):  # a log that takes nothing must not cost the image
                os.write(STDERR, line)
