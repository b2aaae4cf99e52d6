"""JPEG and PNG payloads decoded to RGB. The only place of the daemon that uses OpenCV.

The header's width and height are read before anything is decoded, so that a small file cannot ask for much memory.
Damage that the decoders notice is NotImage. A changed byte in a JPEG's coded data often decodes to something: that is a
frame with a blot, and nobody can tell.
"""

import re
import struct
from functools import cache
from typing import Any

import numpy as np

from iotd.events import RGB
from iotd.ingest.complaints import caught
from iotd.ingest.errors import NotImage, TooLarge

KEEP_PIXELS = 1024 * 1024
"""Larger frames are scaled down to this, 3 MiB of RGB: the model's own ladder of sizes ends below it."""
MAX_ASPECT = 100
"""Longer images are refused. The model takes up to 200 : 1, and scaling down rounds the short side."""

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_END_OF_JPEG = b"\xff\xd9"
_HARMLESS = re.compile(r"extraneous bytes before marker 0xd9|JFIF revision|Adobe color|libpng warning")
"""Padding before the end marker, as webcams write it, and remarks on data that is not the picture."""
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD8)})
_MAX_SEGMENTS = 1000
"""Segments looked at before the frame header; a profile takes at most 255 of them (ICC.1, annex B.4)."""


@cache
def _opencv() -> Any:
    """OpenCV, loaded for the first image: a house without cameras need not have its 16 MB in memory."""
    import cv2

    # One decoding at a time needs no pool of threads, and the cores belong to the model.
    cv2.setNumThreads(1)
    # What OpenCV itself would print about a damaged image is raised here as NotImage.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


def image_size(payload: bytes) -> tuple[int, int]:
    """(width, height) in pixels, from the header alone. Raises NotImage."""
    if payload.startswith(_PNG):
        size = _png_size(payload)
    elif payload.startswith(_JPEG):
        size = _jpeg_size(payload)
    else:
        raise NotImage(f"the payload is neither JPEG nor PNG: it begins with {payload[:4].hex(' ') or 'nothing'}")
    if 0 in size:
        raise NotImage(f"the image's header says {size[0]} by {size[1]} pixels")
    return size


def decode_image(payload: bytes, *, max_pixels: int, keep_pixels: int = KEEP_PIXELS) -> RGB:
    """Decode to RGB, uint8 [H, W, 3], turned upright as its EXIF says; grey becomes three equal channels.

    Raises TooLarge where the header tells of more than `max_pixels` or of a shape beyond MAX_ASPECT, before anything is
    decoded, and NotImage. What follows the image in the payload is ignored, and a JPEG's end marker may be missing, as
    it is from some cameras; a file that is cut in the middle is NotImage.
    An image of more than `keep_pixels` is scaled down, its shape kept.
    """
    width, height = image_size(payload)
    if width * height > max_pixels:
        raise TooLarge(f"the image has {width} by {height} pixels; at most {max_pixels:,} in all are allowed")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise TooLarge(f"the image has {width} by {height} pixels; at most {MAX_ASPECT} : 1 is allowed")
    bgr = _decoded(payload, width * height, keep_pixels)
    cv2 = _opencv()
    return np.asarray(cv2.cvtColor(_shrunk(bgr, keep_pixels), cv2.COLOR_BGR2RGB), dtype=np.uint8)


def _decoded(payload: bytes, n_pixels: int, keep_pixels: int) -> RGB:
    """BGR, uint8 [H, W, 3]. Raises NotImage where it does not decode, or the decoder had to guess.

    One end marker more does no harm behind a whole JPEG; behind a cut one it makes libjpeg say that data is missing,
    where without it OpenCV decodes nothing at all.
    """
    cv2 = _opencv()
    flags: int = cv2.IMREAD_COLOR
    if payload.startswith(_JPEG):
        flags = _flags(n_pixels, keep_pixels)
        payload += _END_OF_JPEG
    try:
        with caught() as complaints:
            bgr = cv2.imdecode(np.frombuffer(payload, np.uint8), flags)
    except cv2.error as e:
        raise NotImage(f"the image does not decode: {e.err}") from e
    harm = next((complaint for complaint in complaints if not _HARMLESS.search(complaint)), "")
    if bgr is None or harm:
        raise NotImage(f"the image is damaged or cut off{': ' if harm else ''}{harm}")
    return np.asarray(bgr, dtype=np.uint8)


def _flags(n_pixels: int, keep_pixels: int) -> int:
    """Lets libjpeg scale while it decodes, as long as more than `keep_pixels` are left. libpng cannot."""
    cv2 = _opencv()
    ladder = ((64, cv2.IMREAD_REDUCED_COLOR_8), (16, cv2.IMREAD_REDUCED_COLOR_4), (4, cv2.IMREAD_REDUCED_COLOR_2))
    flag: int = next((flag for factor, flag in ladder if n_pixels >= factor * keep_pixels), cv2.IMREAD_COLOR)
    return flag


def _shrunk(image: RGB, keep_pixels: int) -> RGB:
    height, width = image.shape[:2]
    if width * height <= keep_pixels:
        return image
    scale = (keep_pixels / (width * height)) ** 0.5
    size = (max(1, int(width * scale)), max(1, int(height * scale)))
    cv2 = _opencv()
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _png_size(payload: bytes) -> tuple[int, int]:
    if len(payload) < 33 or payload[12:16] != b"IHDR":
        raise NotImage("the PNG has no header")
    width, height = struct.unpack(">II", payload[16:24])
    return width, height


def _jpeg_size(payload: bytes) -> tuple[int, int]:
    position = 2
    for _ in range(_MAX_SEGMENTS):
        if position + 9 > len(payload) or payload[position] != 0xFF:
            break
        marker = payload[position + 1]
        if marker in _START_OF_FRAME:
            height, width = struct.unpack(">HH", payload[position + 5 : position + 9])
            return width, height
        if marker == 0xFF:
            position += 1
        elif marker in _WITHOUT_LENGTH:
            position += 2
        else:
            position += 2 + int.from_bytes(payload[position + 2 : position + 4], "big")
    raise NotImage("the JPEG has no frame header")
