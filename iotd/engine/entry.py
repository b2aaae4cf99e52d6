"""An event as the model reads it: tokens and images, with the time it happened. Knows no state and no words."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iotd.events import RGB

Tokens = list[int]


@dataclass(slots=True, eq=False)
class Image:
    """An image for the model, shared by all that read it; encoded at most once, and then without its pixels."""

    rgb: RGB | None
    size: tuple[int, int]
    """Height and width in pixels that the model sees."""
    grid: tuple[int, int, int]
    """Patches (t, h, w) once it is resized."""
    n_tokens: int
    embedding: NDArray[np.float32] | None = None
    """float32 [n, D] once it is encoded."""


Part = Tokens | Image


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Some of an image's tokens, to be read in one go."""

    image: Image
    start: int
    stop: int

    @property
    def n_tokens(self) -> int:
        return self.stop - self.start


Chunk = Tokens | Rows


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One reading or frame, to be read into any state."""

    parts: tuple[Part, ...]
    time_s: float
    """When it arrived, seconds since the Unix epoch."""
    day: str
    """Its local date; a line with the date goes before the first event of each day."""
    n_tokens: int

    @property
    def has_image(self) -> bool:
        return any(isinstance(part, Image) for part in self.parts)


def joined(first: Entry, second: Entry) -> Entry:
    """Two entries of one moment as one, which is read and forgotten as a whole."""
    return Entry((*first.parts, *second.parts), second.time_s, second.day, first.n_tokens + second.n_tokens)


def count_tokens(parts: Iterable[Part | Chunk]) -> int:
    """Positions that the parts take in a state."""
    return sum(len(part) if isinstance(part, list) else part.n_tokens for part in parts)


def chunks(parts: Iterable[Part], size: Callable[[], int]) -> Iterator[Chunk]:
    """The same tokens in runs of at most `size()`, each as long as it can be; a run has text or rows of one image.

    The size is asked for anew for each run.
    """
    run: Tokens = []
    for part in parts:
        if isinstance(part, Image):
            yield from (run[start:stop] for start, stop in _cuts(len(run), size))
            run = []
            yield from (Rows(part, start, stop) for start, stop in _cuts(part.n_tokens, size))
        else:
            run.extend(part)
    yield from (run[start:stop] for start, stop in _cuts(len(run), size))


def _cuts(length: int, size: Callable[[], int]) -> Iterator[tuple[int, int]]:
    start = 0
    while start < length:
        stop = min(start + size(), length)
        yield start, stop
        start = stop
