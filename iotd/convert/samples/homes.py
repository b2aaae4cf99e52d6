"""Made-up homes whose sensors say something now and then, in lines as the context has them.

A sensor's pattern is its text with slots: `<18.0..31.0>` is a number that drifts between these, with as many decimals;
`<+18240..18990>` one that only rises; `<open|closed>` is one of these.
"""

import random
import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from iotd.convert.samples.blocks import Part, read_blocks

_SLOT = re.compile(r"<([^<>]+)>")
_RANGE = re.compile(r"(\+?)(-?[\d.]*\d)\.\.(-?[\d.]*\d)")
_STAYS = 0.5
"""How often a state is said again."""
_SKIPPED = 0.01
"""Of the lines: one that says what the stream lacks."""


@dataclass(frozen=True, slots=True)
class Home:
    """One home, boat, farm or the like."""

    language: str
    sensors: dict[str, str]
    """Pattern of each sensor by its label."""


@dataclass(slots=True)
class Said:
    """The newest that a sensor has said."""

    text: str
    clock: str
    """Time of day."""
    number: float | None = None
    """Where the text begins with its only number."""
    unit: str = ""
    """What follows the number, with its space."""
    decimals: int = 0
    before: str = ""
    """What it said before that."""
    states: tuple[str, ...] = ()
    """All that it could have said, where it has no numbers."""


def homes(part: Part) -> list[Home]:
    """All homes of the calibration texts."""
    return [
        Home(language, dict(_pair(line) for line in body.splitlines()))
        for (language, *_), body in read_blocks(part, "homes")
    ]


def _pair(line: str) -> tuple[str, str]:
    label, _, pattern = line.partition(": ")
    return label, pattern


@dataclass(slots=True)
class Stream:
    """What a home's sensors say, one line after the other."""

    home: Home
    rng: random.Random
    told: dict[str, Said] = field(default_factory=dict)
    """By label."""
    now: datetime = field(init=False)
    _step_s: float = field(init=False)
    _labels: list[str] = field(init=False)
    _values: dict[tuple[str, int], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.now = datetime(2024, 1, 1) + timedelta(seconds=self.rng.randrange(3 * 365 * 86400))
        self._step_s = self.rng.choice((0.5, 3.0, 15.0, 60.0, 400.0))
        most = min(len(self.home.sensors), self.rng.randint(4, 12))
        self._labels = self.rng.sample([*self.home.sensors], most)

    def date(self) -> str:
        """The line before the first event of a day."""
        return self.now.strftime("[%Y-%m-%d %A]\n")

    def lines(self) -> list[str]:
        """The next line, behind that with the date where a day has begun."""
        day = self.now.date()
        self.now += timedelta(seconds=self.rng.expovariate(1 / self._step_s))
        dated = [self.date()] if self.now.date() != day else []
        if self.rng.random() < _SKIPPED:
            n = self.rng.choice((1, 2, 7, 31))
            return [*dated, self._line("skipped", f"{n} older reading{'' if n == 1 else 's'}")]
        label = self.rng.choice(self._labels)
        said = self._say(label)
        self.told[label] = said
        return [*dated, self._line(label, said.text)]

    def clock(self) -> str:
        return self.now.strftime("%H:%M:%S")

    def _line(self, label: str, text: str) -> str:
        return f"[{self.clock()}] {label} {text}\n"

    def _say(self, label: str) -> Said:
        pattern = self.home.sensors[label]
        slots = _SLOT.findall(pattern)
        values = [self._value(label, i, slot) for i, slot in enumerate(slots)]
        said = Said(_filled(pattern, values), self.clock(), before=self.told[label].text if label in self.told else "")
        unit = _SLOT.sub("", pattern)
        if len(slots) == 1 and (limits := _RANGE.fullmatch(slots[0])) and pattern.startswith("<"):
            said.number, said.unit, said.decimals = float(values[0]), unit, _decimals(limits[2])
        elif len(slots) == 1 and not unit:
            said.states = tuple(slots[0].split("|"))
        return said

    def _value(self, label: str, i: int, slot: str) -> str:
        limits = _RANGE.fullmatch(slot)
        last = self._values.get((label, i))
        if limits is None:
            value = last if last and self.rng.random() < _STAYS else self.rng.choice(slot.split("|"))
        else:
            value = self._number(limits, last)
        self._values[label, i] = value
        return value

    def _number(self, limits: re.Match[str], last: str | None) -> str:
        low, high, decimals = float(limits[2]), float(limits[3]), _decimals(limits[2])
        step = self.rng.gauss(0, (high - low) / 50)
        value = self.rng.uniform(low, high) if last is None else float(last) + (abs(step) if limits[1] else step)
        return f"{round(min(max(value, low), high), decimals) + 0.0:.{decimals}f}"


def _filled(pattern: str, values: list[str]) -> str:
    remaining = iter(values)
    return _SLOT.sub(lambda _: next(remaining), pattern)


def _decimals(number: str) -> int:
    return len(number.partition(".")[2])
