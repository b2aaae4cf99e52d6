"""The door camera's picture, drawn: what stands at the door, with its truth. Knows neither the home nor the network."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from iotd.events import RGB

KINDS = ("person", "dog", "car", "parcel", "bicycle")
COLOURS = {
    "red": (196, 40, 36),
    "blue": (36, 72, 184),
    "green": (44, 132, 60),
    "yellow": (228, 188, 40),
    "white": (232, 232, 226),
    "black": (34, 34, 38),
}
SIZE = 160
"""Pixels of a side, unless another is asked for."""
SUPER = 2
"""Drawn so many times larger and averaged down: smooth edges at fractions of a pixel."""

_HEIGHT = {"person": 0.46, "dog": 0.17, "car": 0.30, "parcel": 0.12, "bicycle": 0.24}
"""Of the picture's height, standing at its lower edge."""
_WIDTH = {"person": 0.36, "dog": 1.5, "car": 2.1, "parcel": 1.25, "bicycle": 1.6}
"""Of its own height."""

Colour = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Thing:
    """One object in the picture."""

    kind: str
    colour: str
    box: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels; inside the picture."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture and its truth."""

    rgb: RGB
    """uint8 [size, size, 3]."""
    things: tuple[Thing, ...]
    """From the farthest to the nearest; none is wholly hidden."""
    light: float
    """1 at noon, towards 0 at night."""


def light_at(time_s: float) -> float:
    """Daylight at a time of day (seconds since midnight): 1 from morning to evening, 0.35 at night under the lamp."""
    height = math.sin(2 * math.pi * (time_s / 86400 - 0.25))
    return 0.35 + 0.65 * min(1.0, max(0.0, height * 2 + 0.5))


def draw(
    kinds: Sequence[str],
    rng: np.random.Generator,
    *,
    light: float = 1.0,
    size: int = SIZE,
    noise: np.random.Generator | None = None,
) -> Scene:
    """Draw one object of each of `kinds` (any of KINDS, none for the empty step), placed and coloured at random.

    Each has a lane of its own across the picture, so that all can be seen; which, how near and how large, varies.
    noise: the camera's own chance, where the same scene is to be taken twice.
    """
    canvas, of_the_camera = _Canvas(size), noise or rng.spawn(1)[0]
    _background(canvas, rng)
    things = [_place(kind, lane, len(kinds), rng) for lane, kind in enumerate(rng.permutation(list(kinds)))]
    things.sort(key=lambda thing: thing.bottom)
    for thing in things:
        _shadow(canvas, thing)
        _DRAW[thing.kind](canvas, thing)
    rgb = _exposed(canvas.image(), light, of_the_camera)
    return Scene(rgb, tuple(Thing(t.kind, t.colour, t.box(size)) for t in things), light)


def jpeg(rgb: RGB, quality: int = 85) -> bytes:
    """The picture as a camera sends it."""
    ok, encoded = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert ok
    return encoded.tobytes()


@dataclass(frozen=True, slots=True)
class _Placed:
    """In fractions of the picture's side."""

    kind: str
    colour: str
    left: float
    bottom: float
    width: float
    height: float
    mirrored: bool

    def at(self, x: float, y: float) -> Point:
        """A point of the object's own square: x 0 left to 1 right, y 0 at its top to 1 at its foot."""
        x = 1 - x if self.mirrored else x
        return self.left + x * self.width, self.bottom - (1 - y) * self.height

    def box(self, size: int) -> tuple[int, int, int, int]:
        left, top = self.at(1 if self.mirrored else 0, 0)
        edges = (left, top, left + self.width, self.bottom)
        x0, y0, x1, y1 = (min(size, max(0, round(edge * size))) for edge in edges)
        return x0, y0, x1, y1

    @property
    def paint(self) -> Colour:
        return COLOURS[self.colour]


class _Canvas:
    """Shapes in fractions of the side, drawn enlarged."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._side = size * SUPER
        self._pixels: RGB = np.zeros((self._side, self._side, 3), np.uint8)

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        corners = np.array([self._pixel(p) for p in points], np.int32)
        cv2.fillPoly(self._pixels, [corners], colour)

    def ellipse(self, centre: Point, radii: Point, colour: Colour) -> None:
        axes = (max(1, round(radii[0] * self._side)), max(1, round(radii[1] * self._side)))
        cv2.ellipse(self._pixels, self._pixel(centre), axes, 0, 0, 360, colour, -1)

    def ring(self, centre: Point, radius: float, thickness: float, colour: Colour) -> None:
        cv2.circle(
            self._pixels, self._pixel(centre), max(1, round(radius * self._side)), colour, self._thick(thickness)
        )

    def line(self, points: Sequence[Point], thickness: float, colour: Colour) -> None:
        corners = np.array([self._pixel(p) for p in points], np.int32)
        cv2.polylines(self._pixels, [corners], False, colour, self._thick(thickness))

    def rectangle(self, a: Point, b: Point, colour: Colour) -> None:
        cv2.rectangle(self._pixels, self._pixel(a), self._pixel(b), colour, -1)

    def darken(self, centre: Point, radii: Point) -> None:
        mask = np.zeros(self._pixels.shape[:2], np.uint8)
        axes = (max(1, round(radii[0] * self._side)), max(1, round(radii[1] * self._side)))
        cv2.ellipse(mask, self._pixel(centre), axes, 0, 0, 360, 255, -1)
        self._pixels[mask > 0] = self._pixels[mask > 0] // 2

    def image(self) -> RGB:
        small = cv2.resize(self._pixels, (self._size, self._size), interpolation=cv2.INTER_AREA)
        return np.asarray(small, dtype=np.uint8)

    def _pixel(self, point: Point) -> tuple[int, int]:
        return round(point[0] * self._side), round(point[1] * self._side)

    def _thick(self, thickness: float) -> int:
        return max(1, round(thickness * self._side))


def _place(kind: str, lane: int, n_lanes: int, rng: np.random.Generator) -> _Placed:
    bottom = float(rng.uniform(0.78, 0.97))
    height = _HEIGHT[kind] * float(rng.uniform(0.85, 1.15)) * (0.55 + 0.45 * (bottom - 0.6) / 0.37)
    lane_width = 1 / max(1, n_lanes)
    # A wide thing in a narrow lane shrinks, but not to nothing: at most half of it may reach into the next lane.
    width = min(_WIDTH[kind] * height, 0.95, lane_width * 1.5)
    height = width / _WIDTH[kind]
    room = lane_width - width
    left = lane * lane_width + (float(rng.uniform(0, room)) if room > 0 else room / 2)
    left = min(max(left, 0.01), 0.99 - width)
    colours = (
        ("yellow", "white") if kind == "parcel" else ("black", "white", "yellow") if kind == "dog" else (*COLOURS,)
    )
    return _Placed(kind, str(rng.choice(colours)), left, bottom, width, height, bool(rng.random() < 0.5))


def _background(canvas: _Canvas, rng: np.random.Generator) -> None:
    horizon = float(rng.uniform(0.36, 0.44))
    drift = float(rng.uniform(-0.04, 0.04))
    canvas.rectangle((0, 0), (1, horizon), (168, 196, 224))
    canvas.rectangle((0, horizon - 0.08), (1, horizon), (92, 122, 84))
    canvas.rectangle((0, horizon), (1, 1), (118, 142, 96))
    path = [(0.36 + drift, horizon), (0.64 + drift, horizon), (0.98, 1.0), (0.02, 1.0)]
    canvas.polygon(path, (156, 152, 146))
    canvas.rectangle((0, horizon + 0.05), (1, horizon + 0.13), (112, 112, 116))
    canvas.rectangle((0, 0), (0.05, 1), (126, 84, 62))


def _shadow(canvas: _Canvas, thing: _Placed) -> None:
    canvas.darken((thing.left + thing.width / 2, thing.bottom), (thing.width * 0.52, 0.012))


def _person(canvas: _Canvas, thing: _Placed) -> None:
    skin, trousers = (214, 168, 140), (58, 60, 74)
    for side in (0.28, 0.58):
        canvas.polygon(
            [thing.at(side, 0.55), thing.at(side + 0.18, 0.55), thing.at(side + 0.16, 1), thing.at(side, 1)], trousers
        )
    canvas.polygon([thing.at(0.22, 0.2), thing.at(0.8, 0.2), thing.at(0.78, 0.6), thing.at(0.26, 0.6)], thing.paint)
    for x, hand in ((0.18, 0.06), (0.84, 0.96)):
        canvas.line([thing.at(x, 0.25), thing.at(hand, 0.55)], thing.width * 0.14, thing.paint)
        canvas.ellipse(thing.at(hand, 0.57), (thing.width * 0.07, thing.width * 0.07), skin)
    canvas.ellipse(thing.at(0.5, 0.1), (thing.height * 0.075, thing.height * 0.095), skin)
    canvas.ellipse(thing.at(0.5, 0.045), (thing.height * 0.075, thing.height * 0.05), (72, 48, 34))


def _dog(canvas: _Canvas, thing: _Placed) -> None:
    for x in (0.16, 0.26, 0.6, 0.7):
        canvas.line([thing.at(x, 0.6), thing.at(x, 0.98)], thing.width * 0.06, thing.paint)
    canvas.ellipse(thing.at(0.43, 0.52), (thing.width * 0.32, thing.height * 0.2), thing.paint)
    canvas.ellipse(thing.at(0.8, 0.28), (thing.width * 0.13, thing.height * 0.18), thing.paint)
    canvas.ellipse(thing.at(0.93, 0.34), (thing.width * 0.07, thing.height * 0.09), thing.paint)
    canvas.polygon([thing.at(0.7, 0.16), thing.at(0.78, 0.0), thing.at(0.82, 0.18)], thing.paint)
    canvas.line([thing.at(0.13, 0.45), thing.at(0.01, 0.15)], thing.width * 0.05, thing.paint)
    canvas.ellipse(thing.at(0.985, 0.31), (thing.width * 0.02, thing.height * 0.03), (20, 20, 20))


def _car(canvas: _Canvas, thing: _Placed) -> None:
    cabin = [thing.at(0.2, 0.42), thing.at(0.32, 0.04), thing.at(0.7, 0.04), thing.at(0.84, 0.42)]
    canvas.polygon(cabin, thing.paint)
    for a, b, c, d in (
        ((0.25, 0.4), (0.34, 0.11), (0.49, 0.11), (0.49, 0.4)),
        ((0.53, 0.4), (0.53, 0.11), (0.68, 0.11), (0.78, 0.4)),
    ):
        canvas.polygon([thing.at(*a), thing.at(*b), thing.at(*c), thing.at(*d)], (150, 188, 204))
    body = [
        thing.at(0.01, 0.45),
        thing.at(0.06, 0.38),
        thing.at(0.93, 0.4),
        thing.at(0.99, 0.52),
        thing.at(0.99, 0.82),
        thing.at(0.01, 0.82),
    ]
    canvas.polygon(body, thing.paint)
    for x in (0.23, 0.77):
        canvas.ellipse(thing.at(x, 0.82), (thing.height * 0.18, thing.height * 0.18), (26, 26, 28))
        canvas.ellipse(thing.at(x, 0.82), (thing.height * 0.09, thing.height * 0.09), (170, 170, 172))
    canvas.ellipse(thing.at(0.96, 0.55), (thing.width * 0.02, thing.height * 0.06), (252, 244, 190))


def _parcel(canvas: _Canvas, thing: _Placed) -> None:
    card = (178, 132, 84) if thing.colour == "yellow" else (214, 206, 192)
    canvas.polygon(
        [thing.at(0, 0.25), thing.at(0.2, 0), thing.at(1, 0), thing.at(0.82, 0.25)],
        _lighter(card, 22),
    )
    canvas.polygon([thing.at(0.82, 0.25), thing.at(1, 0), thing.at(1, 0.75), thing.at(0.82, 1)], _lighter(card, -36))
    canvas.polygon([thing.at(0, 0.25), thing.at(0.82, 0.25), thing.at(0.82, 1), thing.at(0, 1)], card)
    canvas.polygon([thing.at(0.34, 0.25), thing.at(0.48, 0.25), thing.at(0.48, 1), thing.at(0.34, 1)], (226, 208, 150))
    canvas.polygon(
        [thing.at(0.56, 0.62), thing.at(0.76, 0.62), thing.at(0.76, 0.86), thing.at(0.56, 0.86)], (244, 244, 240)
    )


def _lighter(colour: Colour, by: int) -> Colour:
    red, green, blue = (min(255, max(0, c + by)) for c in colour)
    return red, green, blue


def _bicycle(canvas: _Canvas, thing: _Placed) -> None:
    radius, thin = thing.height * 0.3, thing.height * 0.045
    rear, front = thing.at(0.2, 0.69), thing.at(0.8, 0.69)
    for hub in (rear, front):
        canvas.ring(hub, radius, thin, (30, 30, 32))
    crank, seat, head = thing.at(0.46, 0.7), thing.at(0.38, 0.28), thing.at(0.7, 0.25)
    canvas.line([rear, seat, head, crank, rear], thin * 1.3, thing.paint)
    canvas.line([seat, crank], thin * 1.3, thing.paint)
    canvas.line([front, head, thing.at(0.67, 0.06), thing.at(0.8, 0.04)], thin * 1.2, thing.paint)
    canvas.line([thing.at(0.3, 0.2), thing.at(0.46, 0.2)], thin * 1.6, (26, 26, 28))


_DRAW: dict[str, Callable[[_Canvas, _Placed], None]] = {
    "person": _person,
    "dog": _dog,
    "car": _car,
    "parcel": _parcel,
    "bicycle": _bicycle,
}


def _exposed(image: RGB, light: float, rng: np.random.Generator) -> RGB:
    """Light, a tint and the sensor's noise, which shows more in the dark."""
    tint = 1 + rng.uniform(-0.05, 0.05, 3) + np.array([-0.08, -0.02, 0.08]) * (1 - light)
    exposed = image * (light * float(rng.uniform(0.9, 1.08)) * tint)
    noisy = exposed + rng.normal(0, 2 + 5 * (1 - light), image.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)
