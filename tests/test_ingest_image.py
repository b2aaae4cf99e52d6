"""Images are measured before they are decoded, come out upright in RGB, and damaged ones are refused."""

import os
import struct
import threading
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iotd.errors import InvalidInput
from iotd.ingest.complaints import caught
from iotd.ingest.errors import NotImage, TooLarge
from iotd.ingest.image import decode_image, image_size

MAX = 1_000_000


def picture(width: int = 64, height: int = 48) -> np.ndarray:
    """RGB: red grows to the right, green downwards, blue is 200."""
    y, x = np.mgrid[0:height, 0:width]
    return np.dstack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), np.full_like(x, 200)]).astype(
        np.uint8
    )


def encoded(extension: str, image: np.ndarray, *parameters: int) -> bytes:
    bgr = image[..., ::-1] if image.ndim == 3 else image
    ok, data = cv2.imencode(extension, np.ascontiguousarray(bgr), list(parameters))
    assert ok
    return data.tobytes()


def with_orientation(jpeg: bytes, orientation: int) -> bytes:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01" + struct.pack(">HHI", orientation, 0, 0)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


def png_header(width: int, height: int) -> bytes:
    """A small file that claims to be large."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IEND\xaeB`\x82"
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("extension", [".jpg", ".png"])
def test_colours_come_out_as_rgb(extension: str) -> None:
    image = picture()
    rgb = decode_image(encoded(extension, image), max_pixels=MAX)
    assert (rgb.dtype, rgb.shape) == (np.uint8, (48, 64, 3))
    assert rgb.flags.c_contiguous
    assert np.abs(rgb.astype(int) - image).mean() < 3


@pytest.mark.parametrize("extension", [".jpg", ".png"])
def test_grey_becomes_three_equal_channels(extension: str) -> None:
    rgb = decode_image(encoded(extension, picture()[..., 0]), max_pixels=MAX)
    assert rgb.shape == (48, 64, 3)
    assert (rgb[..., 0] == rgb[..., 2]).all()


@pytest.mark.parametrize("image", [np.zeros((5, 7, 4), np.uint8), np.zeros((5, 7, 3), np.uint16)])
def test_transparency_and_deep_colours_become_plain_ones(image: np.ndarray) -> None:
    ok, data = cv2.imencode(".png", image)
    assert ok
    rgb = decode_image(data.tobytes(), max_pixels=MAX)
    assert (rgb.dtype, rgb.shape) == (np.uint8, (5, 7, 3))


def test_a_progressive_jpeg_is_read() -> None:
    data = encoded(".jpg", picture(), cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    assert image_size(data) == (64, 48)
    assert decode_image(data, max_pixels=MAX).shape == (48, 64, 3)


def test_exif_turns_the_image_upright() -> None:
    """Orientation 6: the camera lay on its side, so the stored left edge is shown on top."""
    rgb = decode_image(with_orientation(encoded(".jpg", picture()), 6), max_pixels=MAX)
    assert rgb.shape == (64, 48, 3)
    assert rgb[60, 24, 0] > 200 > 50 > rgb[3, 24, 0]


def test_a_large_image_is_scaled_down_in_shape_and_colour() -> None:
    image = picture(400, 200)
    for keep in (79_999, 10_000, 4_000, 1_000):
        rgb = decode_image(encoded(".jpg", image), max_pixels=MAX, keep_pixels=keep)
        height, width = rgb.shape[:2]
        assert keep * 0.9 < width * height <= keep
        assert abs(width / height - 2) < 0.1
        assert np.abs(rgb.reshape(-1, 3).mean(0) - image.reshape(-1, 3).mean(0)).max() < 3


@pytest.mark.parametrize("extension", [".jpg", ".png"])
def test_fine_stripes_scaled_down_are_grey(extension: str) -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, 1::4] = stripes[:, 2::4] = 255
    rgb = decode_image(encoded(extension, stripes), max_pixels=MAX, keep_pixels=64 * 64)
    assert np.abs(rgb.astype(int) - 127).max() < 12


@pytest.mark.parametrize(
    "data", [encoded(".jpg", picture(101, 100)), encoded(".png", picture(101, 100)), png_header(101, 100)]
)
def test_too_many_pixels_are_refused_by_the_header_alone(data: bytes) -> None:
    with pytest.raises(TooLarge, match="101 by 100"):
        decode_image(data, max_pixels=10_000)


def test_a_header_of_enormous_size_costs_nothing() -> None:
    with pytest.raises(TooLarge):
        decode_image(png_header(2**31 - 1, 2**31 - 1), max_pixels=8_000_000)


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)


@pytest.mark.parametrize("extension", [".jpg", ".png"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_cut_off_image_is_refused_in_silence(extension: str, part: float, capfd: pytest.CaptureFixture[str]) -> None:
    data = encoded(extension, noise())
    with pytest.raises(NotImage):
        decode_image(data[: int(len(data) * part)], max_pixels=MAX)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("mode", [cv2.IMWRITE_JPEG_OPTIMIZE, cv2.IMWRITE_JPEG_PROGRESSIVE])
def test_a_jpeg_without_its_end_marker_is_read_and_one_cut_before_it_is_not(mode: int) -> None:
    data = encoded(".jpg", noise(), mode, 1)
    assert data.endswith(b"\xff\xd9")
    whole = decode_image(data, max_pixels=MAX)
    assert np.array_equal(decode_image(data[:-2], max_pixels=MAX), whole)
    with pytest.raises(NotImage, match="cut off"):
        decode_image(data[:-8], max_pixels=MAX)


@pytest.mark.parametrize("extension", [".jpg", ".png"])
def test_what_follows_the_image_is_ignored(extension: str) -> None:
    data = encoded(extension, noise())
    assert np.array_equal(decode_image(data + bytes(5000), max_pixels=MAX), decode_image(data, max_pixels=MAX))


def test_padding_before_the_end_marker_is_no_damage(capfd: pytest.CaptureFixture[str]) -> None:
    data = encoded(".jpg", noise())
    padded = data[:-2] + bytes(20) + data[-2:]
    assert np.array_equal(decode_image(padded, max_pixels=MAX), decode_image(data, max_pixels=MAX))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("extension", [".jpg", ".png"])
def test_damage_that_the_decoder_notices_is_refused_in_silence(
    extension: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = bytearray(encoded(extension, noise(), *((cv2.IMWRITE_JPEG_RST_INTERVAL, 4) if extension == ".jpg" else ())))
    for i in range(len(data) // 2, len(data) // 2 + 300):
        data[i] ^= 0x55
    with pytest.raises(NotImage, match=r"damaged or cut off: (Corrupt JPEG|libpng error)"):
        decode_image(bytes(data), max_pixels=MAX)
    assert capfd.readouterr().err == ""


def test_lines_that_others_write_while_an_image_is_decoded_are_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    with caught() as complaints:
        os.write(2, b'{"message": "one"}\nCorrupt JPEG data: bad Huffman code\n{"message": "two"}\n')
        other = threading.Thread(target=os.write, args=(2, b'{"message": "three"}\n'))
        other.start()
        other.join()
    os.write(2, b"after\n")
    assert complaints == ["Corrupt JPEG data: bad Huffman code"]
    messages = [f'{{"message": "{n}"}}' for n in ("one", "two", "three")]
    assert capfd.readouterr().err.splitlines() == [*messages, "after"]


def test_more_complaints_than_a_pipe_holds_stop_nobody() -> None:
    with caught() as complaints:
        os.write(2, b"libpng warning: again\n" * 10_000)
    assert len(complaints) == 10_000


def test_an_absurdly_long_image_is_refused_by_its_header() -> None:
    assert decode_image(encoded(".png", picture(800, 8)), max_pixels=MAX).shape == (8, 800, 3)
    for width, height in ((801, 8), (8, 801), (8000, 1)):
        with pytest.raises(TooLarge, match="100 : 1"):
            decode_image(encoded(".png", picture(width, height)), max_pixels=MAX)


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"GIF89a" + bytes(50), b"\xff\xd8\xff", b"\xff\xd8\xff\xd9" * 5, b"\xff\xd8" + b"\xff" * 4000,
     b"\xff\xd8" + b"\xff\xe0\x00\x02" * 5000, b"\x89PNG\r\n\x1a\n" + bytes(60), png_header(0, 5), png_header(5, 5)],
)  # fmt: skip
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(NotImage):
        decode_image(data, max_pixels=MAX)


@given(
    st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", encoded(".jpg", picture(8, 8))[:150]]),
    st.binary(max_size=300),
)
def test_any_bytes_behind_a_good_beginning_are_an_image_or_invalid_input(beginning: bytes, rest: bytes) -> None:
    for end in (b"", b"\xff\xd9", b"\0\0\0\0IEND"):
        try:
            rgb = decode_image(beginning + rest + end, max_pixels=4096)
        except InvalidInput:
            continue
        assert rgb.size <= 3 * 4096
