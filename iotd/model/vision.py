"""The vision encoder: one image to the embeddings that stand for it in the text model.

Does the checkpoint's own preprocessing (size, normalisation, patch order), so that the embeddings are those of the
reference on the same pixels.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from iotd.errors import InvalidInput
from iotd.events import RGB
from iotd.model.package import VISION
from iotd.model.resize import resize, target_size
from iotd.model.session import OpenGraph
from iotd.model.spec import VisionSpec

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Grid = tuple[int, int, int]
"""Temporal, vertical and horizontal number of patches."""


class VisionEncoder:
    """The vision graph, opened when the first image comes. One thread encodes; what images take, any thread may ask."""

    def __init__(self, folder: Path, spec: VisionSpec, open_graph: OpenGraph, max_pixels: int | None) -> None:
        self.spec = spec
        self.max_pixels = min(max_pixels or spec.max_pixels, spec.max_pixels)
        self.min_pixels = min(spec.min_pixels, self.max_pixels)
        self._open = partial(open_graph, folder / VISION)
        self._session: ort.InferenceSession | None = None

    def size(self, height: int, width: int, max_pixels: int | None = None) -> tuple[int, int]:
        """Height and width that an image of that many pixels is resized to.

        max_pixels: a bound for this image, which may lie below the smallest area that the processor makes.
        """
        most = min(max_pixels or self.max_pixels, self.max_pixels)
        least = min(self.min_pixels, most)
        return target_size(height, width, factor=self.spec.size_factor, min_pixels=least, max_pixels=most)

    def grid(self, size: tuple[int, int]) -> Grid:
        """Patches of an image of that height and width, which are those of `size`."""
        return 1, size[0] // self.spec.patch_size, size[1] // self.spec.patch_size

    def n_tokens(self, grid: Grid) -> int:
        """Tokens that an image of this grid takes in the text model."""
        return grid[0] * grid[1] * grid[2] // self.spec.merge_size**2

    def encode(self, rgb: RGB, size: tuple[int, int] | None = None) -> Floats:
        """uint8 [H, W, 3] → float32 [n, D]. Raises InvalidInput for anything else. size: to resize it to."""
        check_image(rgb)
        pixels = resize(rgb, *(size or self.size(rgb.shape[0], rgb.shape[1])))
        rows, columns = (side // self.spec.patch_size for side in pixels.shape[:2])
        at = patch_coordinates(rows, columns, self.spec.merge_size)
        position_rows, position_weights = bilinear_corners(at, (rows, columns), self.spec.grid_side)
        cos, sin = axial_rotary(at, self.spec)
        inputs = {
            "patches": patches(pixels, self.spec),
            "position_rows": position_rows,
            "position_weights": position_weights,
            "cos_table": cos,
            "sin_table": sin,
        }
        if self._session is None:
            self._session = self._open()
        found: Floats = self._session.run(["embeddings"], inputs)[0]
        return found

    def close(self) -> None:
        """Give the graph's memory back until the next image."""
        self._session = None

    def rope_offsets(self, grid: Grid) -> tuple[Ints, int]:
        """Rotary offsets int64 [3, n] of an image's tokens from its start, and how many positions it takes in all.

        The temporal axis stands still, height and width run; what follows goes on after the larger (M-RoPE, Qwen2-VL).
        """
        frames, rows, columns = grid[0], grid[1] // self.spec.merge_size, grid[2] // self.spec.merge_size
        offsets = np.stack(np.meshgrid(np.arange(frames), np.arange(rows), np.arange(columns), indexing="ij"))
        return offsets.reshape(3, -1).astype(np.int64), max(rows, columns)


def check_image(rgb: Any) -> None:
    """Raises InvalidInput for what is no uint8 [H, W, 3]."""
    if not isinstance(rgb, np.ndarray):
        raise InvalidInput(f"an image must be an array, uint8 [H, W, 3], not a {type(rgb).__name__}", field="image")
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise InvalidInput(f"an image must be uint8 [H, W, 3], not {rgb.dtype} {list(rgb.shape)}", field="image")


def patches(pixels: RGB, spec: VisionSpec) -> Floats:
    """Normalised patches float32 [N, channels · patch²], those of one merged token next to each other."""
    mean, std = (np.array(values, np.float32) for values in (spec.mean, spec.std))
    scaled = (pixels.astype(np.float32) * np.float32(1 / 255) - mean) / std
    size, merge = spec.patch_size, spec.merge_size
    rows, columns = pixels.shape[0] // (size * merge), pixels.shape[1] // (size * merge)
    blocks = scaled.reshape(rows, merge, size, columns, merge, size, 3)
    return np.ascontiguousarray(blocks.transpose(0, 3, 1, 4, 6, 2, 5)).reshape(-1, 3 * size * size)


def patch_coordinates(rows: int, columns: int, merge: int) -> Ints:
    """Row and column of each patch, int64 [N, 2], in the order of `patches`."""
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    blocks = grid.reshape(rows // merge, merge, columns // merge, merge, 2)
    return np.ascontiguousarray(blocks.transpose(0, 2, 1, 3, 4)).reshape(-1, 2)


def bilinear_corners(at: Ints, grid: tuple[int, int], side: int) -> tuple[Ints, Floats]:
    """Rows int64 [N, 4] of the side² position table and their weights float32 [N, 4, 1] for each patch.

    Bilinear with aligned corners: the grid's first and last patch fall on the table's first and last entry.
    """
    low, high, part = [], [], []
    for axis in (0, 1):
        place = at[:, axis].astype(np.float32) * np.float32(side - 1) / np.float32(max(grid[axis] - 1, 1))
        floor = np.floor(place).astype(np.int64)
        low.append(floor)
        high.append(np.minimum(floor + 1, side - 1))
        part.append((place - floor).astype(np.float32))
    rows = [low[0] * side + low[1], low[0] * side + high[1], high[0] * side + low[1], high[0] * side + high[1]]
    top, left = 1 - part[0], 1 - part[1]
    weights = [top * left, top * part[1], part[0] * left, part[0] * part[1]]
    return np.stack(rows, axis=1), np.stack(weights, axis=1)[..., None].astype(np.float32)


def axial_rotary(at: Ints, spec: VisionSpec) -> tuple[Floats, Floats]:
    """cos and sin, float32 [N, head_dim / 2]: a quarter of the head turns with the row, a quarter with the column."""
    quarter = spec.head_dim // 2
    inverse = 1.0 / np.power(np.float32(spec.rope_theta), np.arange(0, quarter, 2, dtype=np.float32) / quarter)
    angles = (at[:, :, None].astype(np.float32) * inverse.astype(np.float32)).reshape(len(at), -1)
    return np.cos(angles), np.sin(angles)
