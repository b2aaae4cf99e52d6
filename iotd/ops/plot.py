"""Figures as a plot: one SVG file, readable on light and on dark ground. Knows no measurement.

Written out by hand, as iotd is installed without a plotting library.
"""

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from html import escape

from iotd.ops.bench import Figure

AXES = {
    "prefill": "tokens of the prompt",
    "decode": "tokens of context",
    "first token": "tokens of context",
    "image encoding": "pixels a side",
}
"""What the figures of a chart stand over."""
COLOURS = ("#2f81d6", "#d9722b", "#2c9a6b", "#a56cc9", "#b8860b", "#c94f6d")
"""Of the engines, in their order; of middling lightness, as the ink is."""
INK, FAINT = "#7b7b7b", "#7b7b7b40"
COLUMNS = 2
WIDTH, HEIGHT = 460, 290
"""Of one chart with what is written around it, in px."""
LEFT, RIGHT, TOP, BOTTOM = 64, 444, 40, 236
"""Of the part of it that is drawn in."""
LINE = 18
CAPTION_CHARS = 125
BESIDE = 5
"""Between the points of two engines at the same place, in px: so that one does not hide the other."""

Scale = Callable[[float], float]
"""From a value to px."""


def svg(figures: Sequence[Figure], caption: str, axis: str = "") -> str:
    """A chart of all figures that name it, unless there is but one.

    caption: stands below, in lines. axis: what figures stand over in charts that AXES does not have.
    """
    charts = {name: [f for f in figures if f.chart == name] for name in dict.fromkeys(f.chart for f in figures) if name}
    charts = {name: found for name, found in charts.items() if len(found) > 1}
    engines = dict.fromkeys(f.engine for found in charts.values() for f in found)
    colours = {engine: COLOURS[n % len(COLOURS)] for n, engine in enumerate(engines)}
    lines = [part for line in caption.splitlines() for part in textwrap.wrap(line, CAPTION_CHARS)]
    below = math.ceil(len(charts) / COLUMNS) * HEIGHT
    width, height = COLUMNS * WIDTH, below + LINE * (len(lines) + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}">'
    ]
    for n, (name, found) in enumerate(charts.items()):
        row, column = divmod(n, COLUMNS)
        parts += [
            f'<g transform="translate({column * WIDTH} {row * HEIGHT})">',
            *_chart(name, found, colours, AXES.get(name, axis)),
            "</g>",
        ]
    parts += [_text(LEFT, below + LINE * (n + 1), line, "start") for n, line in enumerate(lines)]
    return "\n".join([*parts, "</svg>\n"])


def _chart(name: str, figures: list[Figure], colours: dict[str, str], axis: str) -> Iterator[str]:
    step = _step(max(f.highest for f in figures))
    n_steps = math.ceil(max(f.highest for f in figures) / step)

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * value / (n_steps * step)

    yield _text(LEFT, 20, f"{name}, {figures[0].unit}", "start", weight="bold")
    for n in range(n_steps + 1):
        yield _line(LEFT, y(n * step), RIGHT, y(n * step), FAINT if n else INK)
        yield _text(LEFT - 8, y(n * step) + 4, f"{n * step:g}", "end")
    yield from _curves(figures, colours, y, axis) if figures[0].at else _bars(figures, colours, y)


def _curves(figures: list[Figure], colours: dict[str, str], y: Scale, axis: str) -> Iterator[str]:
    """A line for each engine, over the places of its figures."""
    places = sorted({f.at for f in figures})
    place = math.log2 if places[-1] >= 8 * places[0] else float

    def x(at: float) -> float:
        part = (place(at) - place(places[0])) / (place(places[-1]) - place(places[0]) or 1)
        return LEFT + 24 + part * (RIGHT - LEFT - 48)

    for at in places:
        yield _line(x(at), BOTTOM, x(at), BOTTOM + 4, INK)
        yield _text(x(at), BOTTOM + 18, str(at))
    yield _text((LEFT + RIGHT) / 2, BOTTOM + 38, axis)
    engines = [*dict.fromkeys(f.engine for f in figures)]
    for n, engine in enumerate(engines):
        own = [f for f in figures if f.engine == engine]
        aside = BESIDE * (n - (len(engines) - 1) / 2)
        points = [(x(f.at) + aside, y(f.median)) for f in own]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        yield f'<polyline points="{line}" fill="none" stroke="{colours[engine]}" stroke-width="2"/>'
        for f, (px, py) in zip(own, points, strict=True):
            yield f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" fill="{colours[engine]}"/>'
            yield _spread(px, f, y, colours[engine])
    if len(engines) > 1:
        names = "&#160;&#160; ".join(f'<tspan fill="{colours[name]}">{escape(name)}</tspan>' for name in engines)
        yield f'<text x="{RIGHT}" y="{TOP - 8}" text-anchor="end">{names}</text>'


def _bars(figures: list[Figure], colours: dict[str, str], y: Scale) -> Iterator[str]:
    """A bar for each engine."""
    room = (RIGHT - LEFT) / len(figures)
    for n, f in enumerate(figures):
        middle, width, top = LEFT + (n + 0.5) * room, min(72, 0.6 * room), y(f.median)
        box = f'x="{middle - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" height="{BOTTOM - top:.1f}"'
        yield f'<rect {box} fill="{colours[f.engine]}" fill-opacity="0.75"/>'
        yield _spread(middle, f, y, INK)
        yield _text(middle, y(f.highest) - 6, f"{f.median:.3g}" if f.median < 100 else f"{f.median:.0f}")
        yield _text(middle, BOTTOM + 18, f.engine, colour=colours[f.engine])


def _spread(x: float, f: Figure, y: Scale, colour: str) -> str:
    return _line(x, y(f.lowest), x, y(f.highest), colour)


def _step(highest: float) -> float:
    """Between two lines of the grid: 1, 2 or 5 times a power of ten, for four to eight of them."""
    power = 10.0 ** math.floor(math.log10(highest / 4))
    return next(power * n for n in (5, 2, 1) if power * n <= highest / 4)


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle", colour: str = INK, weight: str = "normal") -> str:
    style = f'text-anchor="{anchor}" fill="{colour}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
