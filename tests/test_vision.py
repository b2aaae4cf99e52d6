"""How pixels become the vision graph's input: laws of sizes and positions, and slow references beside the fast code."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from iotd.errors import InvalidInput
from iotd.model import Model
from iotd.model.package import read_manifest
from iotd.model.resize import MAX_ASPECT, resize, target_size
from iotd.model.session import Threads, open_session
from iotd.model.spec import VisionSpec
from iotd.model.vision import VisionEncoder, bilinear_corners, patch_coordinates, patches

Bytes = NDArray[np.uint8]
SIDE = st.integers(1, 3000)
FACTOR = st.sampled_from([8, 28, 32])
LIMITS = st.tuples(st.integers(1, 300), st.integers(1, 300)).map(sorted)
"""The smallest and the largest area, in squares of the factor."""


@pytest.fixture(scope="module")
def spec(tiny_package: Path) -> VisionSpec:
    vision = read_manifest(tiny_package).spec.vision
    assert vision is not None
    return vision


@pytest.fixture(scope="module")
def model(tiny_package: Path) -> Model:
    return Model.open(tiny_package, threads=1)


def noise(seed: int, height: int, width: int) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def is_long(height: int, width: int) -> bool:
    return max(height, width) > MAX_ASPECT * min(height, width)


@given(height=SIDE, width=SIDE, factor=FACTOR, limits=LIMITS)
def test_sizes_are_multiples_of_the_factor_within_the_limits(
    height: int, width: int, factor: int, limits: list[int]
) -> None:
    """Only where a side would vanish may an image stay larger; and smaller only where limits lie close together."""
    smallest, largest = (squares * factor**2 for squares in limits)
    if is_long(height, width):
        return
    rows, columns = target_size(height, width, factor=factor, min_pixels=smallest, max_pixels=largest)
    assert rows % factor == columns % factor == 0 and min(rows, columns) >= factor
    assert rows * columns <= largest or factor in (rows, columns)
    if largest >= 4 * smallest and min(height, width) >= factor:
        assert rows * columns >= smallest or (rows + factor) * (columns + factor) > largest


@given(height=SIDE, width=SIDE, factor=FACTOR, limits=LIMITS)
def test_the_aspect_ratio_is_kept_within_one_factor(height: int, width: int, factor: int, limits: list[int]) -> None:
    """Each side is less than one factor away from one common scale of both."""
    smallest, largest = (squares * factor**2 for squares in limits)
    if is_long(height, width):
        return
    rows, columns = target_size(height, width, factor=factor, min_pixels=smallest, max_pixels=largest)
    scales = [((size - factor) / side, (size + factor) / side) for size, side in ((rows, height), (columns, width))]
    assert max(low for low, _ in scales) <= min(high for _, high in scales)


@given(rows=st.integers(1, 20), columns=st.integers(1, 20), factor=FACTOR)
def test_a_size_that_fits_is_kept(rows: int, columns: int, factor: int) -> None:
    size = rows * factor, columns * factor
    assert target_size(*size, factor=factor, min_pixels=factor**2, max_pixels=400 * factor**2) == size


@given(height=SIDE, width=SIDE, factor=FACTOR)
def test_sides_can_be_swapped(height: int, width: int, factor: int) -> None:
    if is_long(height, width):
        return
    limits = {"factor": factor, "min_pixels": 4 * factor**2, "max_pixels": 90 * factor**2}
    assert target_size(height, width, **limits) == target_size(width, height, **limits)[::-1]


@pytest.mark.parametrize(("height", "width"), [(0, 0), (0, 10), (10, 0), (1, 201), (4001, 20)])
def test_an_empty_or_absurdly_long_image_is_refused(height: int, width: int) -> None:
    with pytest.raises(InvalidInput, match=f"image of {width} × {height} pixels is empty or longer than 200 : 1"):
        target_size(height, width, factor=32, min_pixels=65536, max_pixels=1 << 24)


def slow_resize(image: Bytes, height: int, width: int) -> NDArray[np.float64]:
    """Bicubic with anti-aliasing in floating point, one pixel and one tap at a time."""
    return along(along(image.astype(np.float64).swapaxes(0, 1), width).swapaxes(0, 1), height)


def along(image: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    length = image.shape[0]
    if length == size:
        return image
    scale = length / size
    stretch = max(scale, 1.0)
    out = np.zeros((size, *image.shape[1:]))
    for i in range(size):
        centre, total = (i + 0.5) * scale, 0.0
        for j in range(length):
            weight = keys((j + 0.5 - centre) / stretch)
            out[i] += weight * image[j]
            total += weight
        out[i] /= total
    return out


def keys(x: float) -> float:
    """R. Keys, Cubic convolution interpolation, 1981, with a = −1/2."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


@pytest.mark.parametrize(
    ("source", "target"),
    [((20, 30), (20, 30)), ((20, 30), (9, 30)), ((20, 30), (20, 77)), ((45, 13), (16, 48)), ((7, 5), (32, 32))],
)
def test_resizing_is_within_a_level_of_the_slow_reference(source: tuple[int, int], target: tuple[int, int]) -> None:
    """Rounded to 8 bits between the two passes, which on smooth pictures costs no more than a level."""
    rows, columns = np.mgrid[: source[0], : source[1]]
    waves = [np.sin(rows / 3 + k) * np.cos(columns / 4 - k) for k in range(3)]
    image = np.rint(127.5 + 90 * np.stack(waves, axis=-1)).astype(np.uint8)
    found = resize(image, *target)
    assert found.dtype == np.uint8 and found.shape == (*target, 3)
    assert np.abs(found - np.clip(slow_resize(image, *target), 0, 255)).max() <= 1.0


def test_resizing_clips_what_overshoots() -> None:
    """Bicubic overshoots at a hard edge: black stays black, white stays white."""
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 4:] = 255
    found = resize(image, 32, 32)
    assert (found[:, :10] <= 1).all() and (found[:, -10:] >= 254).all()


@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
def test_an_even_image_stays_even(value: int) -> None:
    assert (resize(np.full((37, 21, 3), value, np.uint8), 64, 96) == value).all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (3, 1)])
def test_patches_lie_in_the_order_of_the_slow_reference(spec: VisionSpec, rows: int, columns: int) -> None:
    """Merged tokens row by row, in each its patches row by row, in each the channels, in each the pixels."""
    size, merge = spec.patch_size, spec.merge_size
    image = noise(rows, rows * merge * size, columns * merge * size)
    expected, places = [], []
    for row in range(rows):
        for column in range(columns):
            for inner_row in range(merge):
                for inner_column in range(merge):
                    top, left = (row * merge + inner_row) * size, (column * merge + inner_column) * size
                    patch = image[top : top + size, left : left + size].astype(np.float64)
                    expected.append(((patch / 255 - spec.mean) / spec.std).transpose(2, 0, 1).reshape(-1))
                    places.append([top // size, left // size])
    np.testing.assert_allclose(patches(image, spec), expected, atol=1e-6)
    assert patch_coordinates(rows * merge, columns * merge, merge).tolist() == places


def slow_corners(row: int, column: int, grid: tuple[int, int], table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bilinear interpolation in a square table [side, side, D], its corners on the grid's corners."""
    side = len(table)
    y, x = (at * (side - 1) / max(n - 1, 1) for at, n in zip((row, column), grid, strict=True))
    top, left = min(math.floor(y), side - 2), min(math.floor(x), side - 2)
    upper = table[top, left] * (left + 1 - x) + table[top, left + 1] * (x - left)
    lower = table[top + 1, left] * (left + 1 - x) + table[top + 1, left + 1] * (x - left)
    return np.asarray(upper * (top + 1 - y) + lower * (y - top))


@settings(max_examples=30)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), side=st.integers(2, 12))
def test_positions_are_interpolated_as_in_the_slow_reference(rows: int, columns: int, side: int) -> None:
    table = np.random.default_rng(side).standard_normal((side, side, 3))
    at = patch_coordinates(2 * rows, 2 * columns, 2)
    table_rows, weights = bilinear_corners(at, (2 * rows, 2 * columns), side)
    assert table_rows.min() >= 0 and table_rows.max() < side**2
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
    found = (table.reshape(-1, 3)[table_rows] * weights).sum(axis=1)
    expected = [slow_corners(row, column, (2 * rows, 2 * columns), table) for row, column in at.tolist()]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (256, 512), (768, 256)])
def test_tokens_of_an_image_stand_side_by_side(model: Model, height: int, width: int) -> None:
    """One moment; rows and columns run row by row; what follows goes on behind the longer side."""
    encoder = model._encoder()
    grid = encoder.grid(encoder.size(height, width))
    offsets, span = encoder.rope_offsets(grid)
    rows, columns = height // 32, width // 32
    expected = [(0, row, column) for row in range(rows) for column in range(columns)]
    assert [tuple(offset) for offset in offsets.T.tolist()] == expected
    assert span == max(rows, columns)
    assert encoder.n_tokens(grid) == rows * columns == len(expected)


@settings(max_examples=20)
@given(height=st.integers(1, 2000), width=st.integers(1, 2000))
def test_grids_tell_the_number_of_embeddings(model: Model, height: int, width: int) -> None:
    if is_long(height, width):
        return
    grid = model.image_grid((height, width, 3))
    assert grid[0] == 1 and grid[1] % 2 == grid[2] % 2 == 0
    assert model.image_tokens(grid) == grid[1] * grid[2] // 4 >= 64


@pytest.mark.parametrize(("height", "width"), [(256, 256), (40, 300), (500, 333)])
def test_an_image_becomes_as_many_embeddings_as_its_grid_says(model: Model, height: int, width: int) -> None:
    image = noise(0, height, width)
    found = model.encode_image(image)
    assert found.shape == (model.image_tokens(model.image_grid(image.shape)), model.spec.hidden_size)
    assert found.dtype == np.float32 and np.isfinite(found).all()
    np.testing.assert_array_equal(found, model.encode_image(image))


def test_an_image_in_pieces_of_memory_is_the_same_image(model: Model) -> None:
    """Cut out of a larger one, mirrored, or with its channels turned around, without a copy."""
    image = noise(1, 300, 300)
    for view in (image[10:280, 5:270], image[::-1], image[:, :, ::-1]):
        np.testing.assert_array_equal(model.encode_image(view.copy()), model.encode_image(view))


def test_a_bound_on_pixels_is_kept(tiny_package: Path) -> None:
    """Below the package's own smallest area, too."""
    for bound in (20_000, 65_536, 200_000):
        model = Model.open(tiny_package, threads=1, max_image_pixels=bound)
        for shape in ((64, 64), (1000, 1000), (300, 900), (200, 40)):
            _, rows, columns = model.image_grid(shape)
            assert rows * columns * 16**2 <= bound


def test_a_bound_above_the_package_changes_nothing(tiny_package: Path, spec: VisionSpec) -> None:
    encoder = VisionEncoder(tiny_package, spec, partial(open_session, threads=Threads(1)), 1 << 40)
    assert (encoder.min_pixels, encoder.max_pixels) == (spec.min_pixels, spec.max_pixels)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((64, 64), np.uint8), r"not uint8 \[64, 64\]"),
        (np.zeros((64, 64, 1), np.uint8), r"not uint8 \[64, 64, 1\]"),
        (np.zeros((64, 64, 4), np.uint8), r"not uint8 \[64, 64, 4\]"),
        (np.zeros((1, 64, 64, 3), np.uint8), r"not uint8 \[1, 64, 64, 3\]"),
        (np.zeros((64, 64, 3), np.float32), r"not float32 \[64, 64, 3\]"),
        (np.zeros((64, 64, 3), np.int16), "not int16"),
        ("picture.jpg", "not a str"),
        (np.zeros((0, 64, 3), np.uint8), "64 × 0 pixels is empty"),
        (np.zeros((64, 0, 3), np.uint8), "0 × 64 pixels is empty"),
        (np.zeros((1, 500, 3), np.uint8), "500 × 1 pixels is empty or longer"),
    ],
)
def test_what_is_no_image_is_refused_by_what_it_is(model: Model, image: Any, said: str) -> None:
    """Alone, and in a message, where nothing has run yet."""
    with pytest.raises(InvalidInput, match=said):
        model.encode_image(image)
    content = [{"type": "text", "text": "What is this?"}, {"type": "image", "image": image}]
    with pytest.raises(InvalidInput, match=said):
        model.generate([{"role": "user", "content": content}])
