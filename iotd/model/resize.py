"""Image resizing as the model's own image processor does it: which size, and bicubic with anti-aliasing."""

import math

import numpy as np
from numpy.typing import NDArray

from iotd.errors import InvalidInput
from iotd.events import RGB

MAX_ASPECT = 200
BICUBIC_A = -0.5  # Keys' kernel with the parameter that Pillow uses
PRECISION = 1 << 22  # Pillow's fixed-point scale of 8-bit resampling weights


def target_size(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width in pixels, multiples of `factor`, near the aspect ratio, with an area inside of the limits.

    Only an image whose short side would vanish is larger than `max_pixels`: that side stays one `factor`. The rule of
    transformers' `smart_resize` (Qwen2-VL). Raises InvalidInput for an empty or absurdly long image.
    """
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT * min(height, width):
        raise InvalidInput(
            f"an image of {width} × {height} pixels is empty or longer than {MAX_ASPECT} : 1", field="image"
        )
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    if rows * columns > max_pixels:  # also where growing overshot limits that lie close together
        shrink = math.sqrt(height * width / max_pixels)
        rows = math.floor(height / shrink / factor) * factor
        columns = math.floor(width / shrink / factor) * factor
    return max(factor, rows), max(factor, columns)


def resize(rgb: RGB, height: int, width: int) -> RGB:
    """Bicubic with anti-aliasing, uint8 [H, W, 3] to uint8 [height, width, 3]; equals Pillow's `BICUBIC`.

    Like Pillow it goes along the width first and rounds to 8 bits between the two passes.
    """
    out = rgb
    if rgb.shape[1] != width:
        out = _along_rows(out.swapaxes(0, 1), width).swapaxes(0, 1)
    if rgb.shape[0] != height:
        out = _along_rows(out, height)
    return np.ascontiguousarray(out)


def _along_rows(pixels: RGB, size: int) -> RGB:
    """Resample the first axis of uint8 [L, M, 3] to `size`."""
    first, weights = _taps(pixels.shape[0], size)
    out = np.empty((size, *pixels.shape[1:]), np.uint8)
    for i in range(size):
        taps = weights[i]
        window = pixels[first[i] : first[i] + len(taps)].astype(np.float64)
        out[i] = np.clip(np.floor(np.tensordot(taps, window, axes=1) + 0.5), 0, 255)
    return out


def _taps(length: int, size: int) -> tuple[list[int], list[NDArray[np.float64]]]:
    """First source index and weights of each target position (Pillow, src/libImaging/Resample.c)."""
    scale = length / size
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    first, weights = [], []
    for i in range(size):
        centre = (i + 0.5) * scale
        start, stop = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), length)
        taps = _bicubic((np.arange(start, stop, dtype=np.float64) - centre + 0.5) / stretch)
        first.append(start)
        weights.append(np.rint(taps / taps.sum() * PRECISION) / PRECISION)
    return first, weights


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic convolution kernel."""
    x, a = np.abs(x), BICUBIC_A
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
