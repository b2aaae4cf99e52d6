"""Pictures for calibrating a vision tower: drawn, with the textures and the light of photographs."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Size = tuple[int, int]

MIN_SIDE, MAX_SIDE = 224, 512


def pictures(n: int, seed: int) -> list[NDArray[np.uint8]]:
    """uint8 [H, W, 3] each, of many sizes, by day and by night. A larger `n` adds to those of a smaller one."""
    return [_picture(np.random.default_rng((seed, i))) for i in range(n)]


def _picture(rng: np.random.Generator) -> NDArray[np.uint8]:
    height, width = (int(side) for side in rng.integers(MIN_SIDE, MAX_SIDE + 1, 2))
    canvas = _background(rng, (height, width))
    layers = (_blob, _box, _stripes, _strokes, _shadow)
    for layer in rng.choice(len(layers), int(rng.integers(3, 12))):
        layers[layer](rng, canvas)
    return _exposed(rng, canvas)


def _background(rng: np.random.Generator, size: Size) -> Floats:
    """A wall, a sky or a ground [H, W, 3], 0 to 1: one colour turning into another, and coloured 1/f noise."""
    down, across = _axes(size)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = 0.5 + 0.5 * (np.cos(angle) * (2 * across - 1) + np.sin(angle) * (2 * down - 1)) / np.sqrt(2)
    first, second = rng.uniform(0.05, 0.95, (2, 3))
    canvas = first + (second - first) * ramp[..., None]
    noise = _noise(rng, size, rng.uniform(0.7, 1.6))[..., None] * rng.uniform(0.3, 1.0, 3)
    return np.asarray(canvas + rng.uniform(0.02, 0.2) * noise, np.float32)


def _noise(rng: np.random.Generator, size: Size, power: float) -> Floats:
    """[H, W] of mean 0 and deviation 1, whose amplitude falls as 1 / frequency ** power."""
    frequency = np.hypot(np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal(size)) / frequency**power
    noise = np.fft.irfft2(spectrum, size)
    return np.asarray(noise / noise.std(), np.float32)


def _blob(rng: np.random.Generator, canvas: Floats) -> None:
    """Something round with a texture of its own, lit from one side, with a sharp edge or a soft one."""
    across, down, radius = _around(rng, canvas)
    cover = 1 / (1 + np.exp((radius - 1) * rng.choice((6.0, 40.0))))
    light = 1 + rng.uniform(0, 0.6) * (across * rng.uniform(-1, 1) + down * rng.uniform(-1, 1))
    _paint(canvas, cover, _surface(rng, canvas) * np.clip(light, 0.2, 1.8)[..., None])


def _box(rng: np.random.Generator, canvas: Floats) -> None:
    """Something square, such as a door or a window, turned a little."""
    across, down, _ = _around(rng, canvas)
    cover = 1 / (1 + np.exp((np.maximum(abs(across), abs(down)) - 0.8) * 60))
    _paint(canvas, cover, _surface(rng, canvas))


def _stripes(rng: np.random.Generator, canvas: Floats) -> None:
    """A fence, blinds or tiles over a part of the picture."""
    across, down, radius = _around(rng, canvas)
    lines = np.cos(across * rng.uniform(8, 60)) > rng.uniform(-0.7, 0.7)
    if rng.random() < 0.4:
        lines &= np.cos(down * rng.uniform(8, 60)) > -0.8
    _paint(canvas, lines * (radius < 1.2) * rng.uniform(0.3, 1.0), rng.uniform(0, 1, 3))


def _strokes(rng: np.random.Generator, canvas: Floats) -> None:
    """Rows of short thin lines, as writing on a label or a sign has them."""
    height, width = canvas.shape[:2]
    size = int(rng.integers(6, 28))
    thick = max(1, size // 8)
    colour = rng.choice((0.02, 0.98)) + rng.uniform(-0.02, 0.02, 3)
    left, right = sorted(int(x) for x in rng.integers(0, width, 2))
    for top in range(int(rng.integers(0, height)), height - size, size * 2)[: int(rng.integers(1, 6))]:
        for x in range(left, right - size, max(2, size * 2 // 3)):
            for _ in range(0 if rng.random() < 0.15 else 3):
                a, b = rng.integers(0, size, 2)
                tall, wide = (thick, size // 2) if rng.random() < 0.4 else (size - int(a), thick)
                canvas[top + a : top + a + tall, x + b // 2 : x + b // 2 + wide] = colour


def _shadow(rng: np.random.Generator, canvas: Floats) -> None:
    """A half plane or something round in less light."""
    across, _, radius = _around(rng, canvas)
    edge = across if rng.random() < 0.5 else radius - 1
    canvas *= (1 - rng.uniform(0.2, 0.8) / (1 + np.exp(edge * rng.uniform(3, 30))))[..., None]


def _exposed(rng: np.random.Generator, canvas: Floats) -> NDArray[np.uint8]:
    """As a camera would give it: too bright, too dark, tinted, with the noise of its sensor; grey at times."""
    night = rng.random() < 0.3
    light = rng.uniform(0.05, 0.35) if night else rng.uniform(0.7, 1.4)
    seen = np.clip(canvas, 0, None) ** rng.uniform(0.8, 1.4) * light * rng.uniform(0.85, 1.15, 3)
    if night and rng.random() < 0.5:
        seen = np.repeat(seen.mean(axis=2, keepdims=True), 3, axis=2) * 2  # infrared
    seen = seen + rng.normal(0, rng.uniform(0.02, 0.05) if night else 0.01, seen.shape)
    return np.asarray(np.clip(seen * 255, 0, 255).round(), np.uint8)


def _around(rng: np.random.Generator, canvas: Floats) -> tuple[Floats, Floats, Floats]:
    """Coordinates [H, W] about a random centre, turned and stretched: across, down, and the distance."""
    down, across = _axes((canvas.shape[0], canvas.shape[1]))
    across, down = across - rng.uniform(0, 1), down - rng.uniform(0, 1)
    angle = rng.normal(0, 0.3)
    turned = across * np.cos(angle) + down * np.sin(angle), down * np.cos(angle) - across * np.sin(angle)
    across, down = (axis / rng.uniform(0.05, 0.35) for axis in turned)
    return across, down, np.hypot(across, down)


def _axes(size: Size) -> tuple[Floats, Floats]:
    """0 to 1 from top to bottom [H, 1], and from left to right [1, W]."""
    height, width = size
    return np.linspace(0, 1, height, dtype=np.float32)[:, None], np.linspace(0, 1, width, dtype=np.float32)[None]


def _surface(rng: np.random.Generator, canvas: Floats) -> Floats:
    """A colour with a texture [H, W, 3]."""
    noise = _noise(rng, (canvas.shape[0], canvas.shape[1]), rng.uniform(0.3, 1.5))
    return np.asarray(rng.uniform(0, 1, 3) * (1 + rng.uniform(0, 0.3) * noise[..., None]), np.float32)


def _paint(canvas: Floats, cover: NDArray[Any], colour: NDArray[Any]) -> None:
    """Lay a colour over the picture, as far as it covers."""
    canvas += cover[..., None] * (colour - canvas)
