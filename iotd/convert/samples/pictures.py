"""Pictures for calibrating a vision tower: drawn, with the textures, the colours and the light of photographs."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Random = np.random.Generator

MIN_SIDE, MAX_SIDE = 224, 512
"""Pixels."""

_POWERS = (0.6, 1.0, 1.5)
"""Of the textures: amplitude falls as 1 / frequency ** power, in photographs with about 1."""


@dataclass(frozen=True, slots=True)
class _Canvas:
    """A picture that is being drawn."""

    rgb: Floats
    """[H, W, 3], 0 is black and 1 is white."""
    textures: list[Floats]
    """Noise [H, W] of mean 0 and deviation 1, from rough to smooth."""

    @property
    def size(self) -> tuple[int, int]:
        return self.rgb.shape[0], self.rgb.shape[1]

    def paint(self, cover: NDArray[Any], colour: NDArray[Any]) -> None:
        """Lay a colour over the picture. cover: [H, W], 1 where nothing shines through."""
        self.rgb[:] += cover[..., None].astype(np.float32) * (colour.astype(np.float32) - self.rgb)


def pictures(n: int, seed: int) -> list[NDArray[np.uint8]]:
    """uint8 [H, W, 3] each, of many sizes, by day and by night. A larger `n` adds to those of a smaller one."""
    return [_picture(np.random.default_rng((seed, i))) for i in range(n)]


def _picture(rng: Random) -> NDArray[np.uint8]:
    height, width = (int(side) for side in rng.integers(MIN_SIDE, MAX_SIDE + 1, 2))
    canvas = _Canvas(
        np.zeros((height, width, 3), np.float32), [_noise(rng, (height, width), power) for power in _POWERS]
    )
    canvas.rgb[:] = _background(rng, canvas)
    layers = (_blob, _box, _stripes, _strokes, _shadow)
    for layer in rng.choice(len(layers), int(rng.integers(3, 12))):
        layers[layer](rng, canvas)
    return _exposed(rng, canvas.rgb)


def _noise(rng: Random, size: tuple[int, int], power: float) -> Floats:
    frequency = np.hypot(np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal(size)) / frequency**power
    noise = np.fft.irfft2(spectrum, size)
    return np.asarray(noise / noise.std(), np.float32)


def _colour(rng: Random) -> Floats:
    """[3]: mostly muted, as of walls, wood, leaves and skin, and at times bright."""
    chroma = rng.normal(0, 1, 3) * (0.3 if rng.random() < 0.15 else 0.06)
    return np.asarray(np.clip(rng.uniform(0.05, 0.95) + chroma, 0, 1), np.float32)


def _surface(rng: Random, canvas: _Canvas) -> Floats:
    """A colour with a texture [H, W, 3]."""
    texture = canvas.textures[rng.integers(len(canvas.textures))]
    shifts = int(rng.integers(texture.shape[0])), int(rng.integers(texture.shape[1]))
    noise = np.roll(texture, shifts, (0, 1))[..., None]
    return np.asarray(_colour(rng) * (1 + np.float32(rng.uniform(0, 0.25)) * noise), np.float32)


def _background(rng: Random, canvas: _Canvas) -> Floats:
    """A wall, a sky or a ground [H, W, 3]: one surface turning into another, over the whole or at an edge."""
    across, down = _axes(canvas)
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * (across - 0.5) + np.sin(angle) * (down - 0.5)
    ramp = _step(along * rng.choice((4.0, 12.0, 200.0)))[..., None]
    return np.asarray(_surface(rng, canvas) * ramp + _surface(rng, canvas) * (1 - ramp), np.float32)


def _blob(rng: Random, canvas: _Canvas) -> None:
    """Something round, lit from one side, with a sharp edge or a soft one."""
    across, down, radius = _around(rng, canvas)
    light = np.clip(1 + 0.6 * (across * rng.uniform(-1, 1) + down * rng.uniform(-1, 1)), 0.2, 1.8)
    canvas.paint(_step((1 - radius) * rng.choice((6.0, 40.0))), _surface(rng, canvas) * light[..., None])


def _box(rng: Random, canvas: _Canvas) -> None:
    """Something square, such as a door or a window, turned a little."""
    across, down, _ = _around(rng, canvas)
    canvas.paint(_step((0.8 - np.maximum(abs(across), abs(down))) * 60), _surface(rng, canvas))


def _stripes(rng: Random, canvas: _Canvas) -> None:
    """A fence, blinds or tiles over a part of the picture."""
    across, down, radius = _around(rng, canvas)
    lines = np.cos(across * rng.uniform(8, 60)) > rng.uniform(-0.7, 0.7)
    if rng.random() < 0.4:
        lines &= np.cos(down * rng.uniform(8, 60)) > -0.8
    canvas.paint(lines * (radius < 1.2) * rng.uniform(0.3, 1.0), _colour(rng))


def _strokes(rng: Random, canvas: _Canvas) -> None:
    """Rows of short thin lines, as writing on a label or a sign has them."""
    height, width = canvas.size
    size = int(rng.integers(6, 28))
    ink = np.float32(rng.choice((0.03, 0.97)))
    left, right = sorted(int(x) for x in rng.integers(0, width, 2))
    for top in range(int(rng.integers(0, height)), height - size, size * 2)[: int(rng.integers(1, 6))]:
        for x in range(left, right - size, max(2, size * 2 // 3)):
            if rng.random() < 0.85:
                _letter(rng, canvas.rgb[top : top + size, x : x + size], ink)


def _letter(rng: Random, rgb: Floats, ink: np.float32) -> None:
    """Three strokes, upright or level, in a square part of a picture."""
    size = len(rgb)
    thick = max(1, size // 8)
    for _ in range(3):
        y, x = int(rng.integers(size)), int(rng.integers(size)) // 2
        if rng.random() < 0.4:
            rgb[y : y + thick, x : x + size // 2] = ink
        else:
            rgb[y:, x : x + thick] = ink


def _shadow(rng: Random, canvas: _Canvas) -> None:
    """A half plane or something round in less light."""
    across, _, radius = _around(rng, canvas)
    edge = across if rng.random() < 0.5 else radius - 1
    canvas.rgb[:] *= (1 - rng.uniform(0.2, 0.8) * _step(-edge * rng.uniform(3, 30)))[..., None]


def _exposed(rng: Random, rgb: Floats) -> NDArray[np.uint8]:
    """As a camera gives it: bright or dark, tinted, with the noise of its sensor, grey where it sees by infrared."""
    night = rng.random() < 0.3
    light = rng.uniform(0.15, 0.45) if night else rng.uniform(0.7, 1.4)
    seen = np.clip(rgb, 0, None) ** np.float32(rng.uniform(0.8, 1.4)) * (light * rng.uniform(0.88, 1.12, 3))
    if night and rng.random() < 0.5:
        seen = np.repeat(seen.mean(axis=2, keepdims=True), 3, axis=2) * 2
    seen = seen + rng.standard_normal(seen.shape, np.float32) * (rng.uniform(0.01, 0.04) if night else 0.01)
    return np.asarray(np.clip(seen * 255, 0, 255).round(), np.uint8)


def _around(rng: Random, canvas: _Canvas) -> tuple[Floats, Floats, Floats]:
    """Coordinates [H, W] about a random centre, turned and stretched: across, down, and the distance."""
    across, down = _axes(canvas)
    across, down = across - np.float32(rng.uniform(0, 1)), down - np.float32(rng.uniform(0, 1))
    angle, (wide, tall) = rng.normal(0, 0.3), rng.uniform(0.05, 0.35, 2)
    right = np.asarray((across * np.cos(angle) + down * np.sin(angle)) / wide, np.float32)
    low = np.asarray((down * np.cos(angle) - across * np.sin(angle)) / tall, np.float32)
    return right, low, np.hypot(right, low)


def _axes(canvas: _Canvas) -> tuple[Floats, Floats]:
    """0 to 1 from left to right [1, W], and from top to bottom [H, 1]."""
    height, width = canvas.size
    return np.linspace(0, 1, width, dtype=np.float32)[None], np.linspace(0, 1, height, dtype=np.float32)[:, None]


def _step(x: NDArray[Any]) -> NDArray[Any]:
    """From 0 far below 0 to 1 far above it."""
    return np.asarray(0.5 + 0.5 * np.tanh(x))
