"""Exact figures beside the stream: for each sensor its newest value, and the extremes, mean and trend of its last day.

Small models misquote numbers; these are written in front of a question that asks for them. Memory is fixed: so many
sensors, and for each a day in buckets. Knows no model; any thread may use it.
"""

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from iotd.counters import Counters
from iotd.events import FORGOTTEN, Reading

MAX_SENSORS = 512
BUCKET_S = 600.0
N_BUCKETS = 144
"""A day of them."""
TREND_BUCKETS = 6
"""The trend is that of the last hour."""
_NUMBER = re.compile(r"([+-]?\d+(?:\.\d+)?)(.*)", re.DOTALL)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Figures:
    """What is known of one sensor."""

    source: str
    text: str
    """Its newest value, as it came."""
    time_s: float
    """When that came, Unix time."""
    unit: str = ""
    lowest: float | None = None
    """Of the last 24 hours, as the mean and the highest; None where its values are no numbers."""
    highest: float | None = None
    mean: float | None = None
    per_hour: float | None = None
    """Its change in an hour, from the last hour; None where that is not known."""


class Ledger:
    """Hears every reading, those too that the context skips. The sensor silent for longest is forgotten."""

    def __init__(self, counters: Counters, max_sensors: int = MAX_SENSORS) -> None:
        self._counters = counters
        self._max_sensors = max_sensors
        self._lock = threading.Lock()
        self._rows: OrderedDict[str, int] = OrderedDict()
        self._newest: dict[str, Reading] = {}
        self._heard: dict[str, int] = {}
        self._n_forgotten = 0
        shape = max_sensors, N_BUCKETS
        self._bucket = np.full(shape, -1, np.int64)
        self._lowest, self._highest, self._sum = (np.zeros(shape, np.float64) for _ in range(3))
        self._count = np.zeros(shape, np.int64)

    def hear(self, reading: Reading) -> None:
        """Take in a reading. One that is older than the newest counts for the day, and not as the newest."""
        with self._lock:
            row = self._row(reading.source)
            self._heard[reading.source] = self._heard.get(reading.source, 0) + 1
            newest = self._newest.get(reading.source)
            if newest is None or reading.time_s >= newest.time_s:
                self._newest[reading.source] = reading
            if (value := _value(reading.text)) is not None:
                self._add(row, int(reading.time_s // BUCKET_S), value)

    def heard(self) -> dict[str, int]:
        """Readings of each sensor that is remembered, and of all others under FORGOTTEN."""
        with self._lock:
            return {**self._heard, **({FORGOTTEN: self._n_forgotten} if self._n_forgotten else {})}

    def find(self, question: str, patterns: Sequence[str], most: int) -> list[Figures]:
        """At most so many sensors: those whose label fits a pattern, such as `* temperature`; without patterns, those
        of whose label most words stand in the question.
        """
        with self._lock:
            sources = list(self._rows)
            if patterns:
                chosen = [source for source in sources if any(fnmatchcase(source, pattern) for pattern in patterns)]
            else:
                chosen = _named(sources, question)
            return [self._figures(source) for source in sorted(chosen)[:most]]

    def _row(self, source: str) -> int:
        row = self._rows.get(source)
        if row is None:
            if len(self._rows) < self._max_sensors:
                row = len(self._rows)
            else:
                silent, row = self._rows.popitem(last=False)
                del self._newest[silent]
                self._n_forgotten += self._heard.pop(silent)
                self._counters.add("forgotten_sensors")
            self._bucket[row] = -1
            self._rows[source] = row
        self._rows.move_to_end(source)
        return row

    def _add(self, row: int, bucket: int, value: float) -> None:
        at = bucket % N_BUCKETS
        if self._bucket[row, at] > bucket:
            return  # more than a day old
        if self._bucket[row, at] != bucket:
            self._bucket[row, at] = bucket
            self._lowest[row, at], self._highest[row, at] = value, value
            self._sum[row, at], self._count[row, at] = 0.0, 0
        self._lowest[row, at] = min(self._lowest[row, at], value)
        self._highest[row, at] = max(self._highest[row, at], value)
        self._sum[row, at] += value
        self._count[row, at] += 1

    def _figures(self, source: str) -> Figures:
        row, newest = self._rows[source], self._newest[source]
        last = int(newest.time_s // BUCKET_S)
        known = np.flatnonzero((self._bucket[row] > last - N_BUCKETS) & (self._bucket[row] <= last))
        match = _NUMBER.fullmatch(newest.text)
        if match is None or not len(known):
            return Figures(source, newest.text, newest.time_s)
        return Figures(
            source,
            newest.text,
            newest.time_s,
            unit=match[2],
            lowest=float(self._lowest[row, known].min()),
            highest=float(self._highest[row, known].max()),
            mean=float(self._sum[row, known].sum() / self._count[row, known].sum()),
            per_hour=self._trend(row, known[self._bucket[row, known] > last - TREND_BUCKETS]),
        )

    def _trend(self, row: int, at: np.ndarray) -> float | None:
        """Slope of the straight line through the buckets' means (least squares)."""
        if len(at) < 3:
            return None
        hours = self._bucket[row, at] * (BUCKET_S / 3600)
        means = self._sum[row, at] / self._count[row, at]
        hours = hours - hours.mean()
        return float((hours * (means - means.mean())).sum() / (hours**2).sum())


def describe(figures: Figures, clock: str) -> str:
    """One line of plain words. clock: when the newest value came, as the stream writes it."""
    line = f"exact {figures.source}: {figures.text} {clock}"
    if figures.lowest is None or figures.highest is None or figures.mean is None:
        return f"{line}\n"
    unit = figures.unit
    line += f"; in 24 hours {figures.lowest:g} to {figures.highest:g}{unit}, on average {figures.mean:.3g}{unit}"
    if figures.per_hour is not None:
        line += f"; {figures.per_hour:+.2g}{unit} in an hour"
    return f"{line}\n"


def _value(text: str) -> float | None:
    match = _NUMBER.fullmatch(text)
    return None if match is None or len(match[1]) > 300 else float(match[1])


def _named(sources: Sequence[str], question: str) -> list[str]:
    asked = _words(question)
    shared = {source: len(asked & _words(source)) for source in sources}
    best = max(shared.values(), default=0)
    return [source for source, n in shared.items() if n == best] if best else []


def _words(text: str) -> set[str]:
    """In lower case, without the ending of a plural."""
    return {word.removesuffix("s") for word in _WORD.findall(text.casefold())}
