"""What work takes on this machine: learnt from every unit that runs, and asked before any is planned.

What is done between two units of one answer counts for the second: text told, the queue looked through.

A kind of work has a shape (how its time grows with tokens and positions), which its first units tell, and a speed: a
processor that throttles, or a neighbour that takes its cores, shows within a few units. One stall changes neither.

Knows no model: it sees how long units of which size took.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from statistics import fmean, median

import numpy as np
from numpy.typing import NDArray

Features = tuple[float, ...]
Samples = list[list[float]]
"""Of one kind: features, and behind them seconds."""

RECENT = 15
"""Units that tell the speed."""
OUTLIERS = 3
"""Of these, at either end, that do not count: the others' mean is what many units come to, and no stall is in it."""
MANY = 4 * RECENT
"""Units that tell how far those of about one size are off the others: more than a change of speed passes through."""
SPREAD = 64
"""Units by which a slow one is told from a usual one."""
SLOW = 0.95
"""Of them take less than a slow unit."""
UNSURE = 1.25
"""What a slow unit is taken for, against a usual one, before there are enough."""
LEAST_SPREAD, MOST_SPREAD = 1.02, 3.0
FIRST = 24
"""Units that make the shape. Later ones do not: as the context grows, its effect could not be told from the speed's."""
RIDGE = 0.03
"""Holds the coefficients that samples do not tell apart at nought, but for the main one (ridge regression)."""
ROUNDS, LEAST_ERROR = 4, 0.02
"""Of weighting each sample by how far it is off (iteratively reweighted least squares, of absolute errors)."""


class Costs:
    """Learns on the model's thread; any thread may ask. What was never seen takes no time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.busy_until_s = 0.0
        """When the unit in hand will have ended, or the last one has, on the clock."""
        self._clock = clock
        self._fits = _fits()
        self._followed_s: float | None = None
        """When the last unit ended, which the next one follows."""

    @property
    def known(self) -> bool:
        """Answers can be planned."""
        return self._fits["read"].seen and self._fits["step"].seen

    def begin(self) -> None:
        """What is done from now on counts for the next unit."""
        self._followed_s = self._clock()

    def rest(self) -> None:
        """What was done up to the next unit counts for none."""
        self._followed_s = None

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Around a copy of a state."""
        with self._unit("fork", (1.0,)):
            yield

    @contextmanager
    def read(self, n_tokens: int, position: int, *, logits: bool = False) -> Iterator[None]:
        """Around a run that reads so many tokens behind so many."""
        with self._unit("read", _reading(n_tokens, position, logits)):
            yield

    @contextmanager
    def step(self, position: int) -> Iterator[None]:
        """Around a run that draws one token of free text."""
        with self._unit("step", _stepping(position)):
            yield

    @contextmanager
    def form(self, n_tokens: int, position: int) -> Iterator[None]:
        """Around a run that reads so many tokens and draws one of a given form."""
        with self._unit("form", (1.0, n_tokens, position / 1024)):
            yield

    @contextmanager
    def image(self, n_tokens: int) -> Iterator[None]:
        """Around encoding an image of so many tokens."""
        with self._unit("image", (1.0, n_tokens)):
            yield

    def fork_s(self) -> float:
        return self._fits["fork"].predict((1.0,))

    def read_s(self, n_tokens: float, position: int, *, logits: bool = False) -> float:
        return self._fits["read"].predict(_reading(n_tokens, position, logits))

    def step_s(self, position: int, *, slow: bool = False) -> float:
        """slow: 95 of 100 take less."""
        return self._fits["step"].predict(_stepping(position), slow=slow)

    def form_s(self, n_tokens: float, position: int, *, slow: bool = False) -> float:
        """Of one that was never seen: what reading as many tokens takes."""
        fit = self._fits["form"]
        if not fit.seen:
            return self.read_s(n_tokens, position, logits=True)
        return fit.predict((1.0, n_tokens, position / 1024), slow=slow)

    def image_s(self, n_tokens: int) -> float:
        """Before one was encoded: what reading as many tokens takes, which is about the same with Qwen3.5."""
        fit = self._fits["image"]
        return fit.predict((1.0, n_tokens)) if fit.seen else self.read_s(n_tokens, 0)

    @property
    def read_spread(self) -> float:
        """What a slow run of reading takes, against a usual one."""
        return self._fits["read"].spread

    def tokens_within(self, limit_s: float, position: int, most: int) -> int:
        """As many as can be read in one run that takes no longer: one at least and `most` at most."""
        base_s = self.read_s(0, position)
        token_s = self.read_s(1, position) - base_s
        if token_s <= 0:
            return most
        return max(1, min(most, int((limit_s - base_s) / token_s)))

    @property
    def image_seen(self) -> bool:
        return self._fits["image"].seen

    def pack(self) -> dict[str, Samples]:
        """What was learnt, to be kept over a restart."""
        return {kind: fit.pack() for kind, fit in self._fits.items()}

    def unpack(self, kept: dict[str, Samples]) -> None:
        """Go on from what `pack` gave. Raises ValueError for anything else, and has learnt nothing then."""
        fits = _fits()
        for kind, fit in fits.items():
            fit.unpack(kept.get(kind, []), _FEATURES[kind][0])
        self._fits = fits

    @contextmanager
    def _unit(self, kind: str, features: Features) -> Iterator[None]:
        began_s = self._clock() if self._followed_s is None else self._followed_s
        self.busy_until_s = began_s + self._fits[kind].predict(features)
        yield
        self.busy_until_s = self._followed_s = self._clock()
        self._fits[kind].learn(features, self.busy_until_s - began_s)


def _reading(n_tokens: float, position: int, logits: bool) -> Features:
    return 1.0, n_tokens, n_tokens * (position + n_tokens / 2) / 1024, float(logits)


def _stepping(position: int) -> Features:
    return 1.0, position / 1024


_FEATURES = {"fork": (1, 0), "read": (4, 1), "step": (2, 0), "form": (3, 0), "image": (2, 1)}
"""How many, and which of them explains whatever it can."""


def _fits() -> "dict[str, _Fit]":
    return {kind: _Fit(main) for kind, (_, main) in _FEATURES.items()}


class _Fit:
    """Seconds as speed × correction of the size × (shape · features)."""

    def __init__(self, main: int) -> None:
        """main: the feature that explains whatever it can, until there are units that tell it from the others."""
        self.spread = UNSURE
        self._main = main
        self._shape: tuple[float, ...] = ()
        self._speed = 1.0
        self._first: Samples = []
        """What the shape comes from."""
        self._ratios: deque[tuple[int, float]] = deque(maxlen=MANY)
        """Of the last units' sizes and times to what the shape alone says."""
        self._offs: deque[float] = deque(maxlen=SPREAD)
        self._by_size: dict[int, deque[float]] = {}
        self._corrections: dict[int, float] = {}

    @property
    def seen(self) -> bool:
        return bool(self._shape)

    def predict(self, features: Features, *, slow: bool = False) -> float:
        usual_s = self._speed * self._corrections.get(_size(features), 1.0) * self._plain(features)
        return usual_s * self.spread if slow else usual_s

    def learn(self, features: Features, took_s: float) -> None:
        if len(self._first) < FIRST and took_s > 0:
            self._first.append([*features, took_s / self._speed])
            self._shape = _fitted(self._first, self._main)
        plain_s = self._plain(features)
        if plain_s <= 0 or took_s <= 0:
            return
        self._offs.append(took_s / max(self.predict(features), plain_s / 1e3))
        size, ratio = _size(features), took_s / plain_s
        self._ratios.append((size, ratio))
        # Against ratios that no correction is in: otherwise speed and corrections would drift apart.
        same_size = self._by_size.setdefault(size, deque(maxlen=MANY))
        same_size.append(ratio / median(each for _, each in self._ratios))
        if len(same_size) >= RECENT:
            self._corrections[size] = median(same_size)
        recent = list(self._ratios)[-RECENT:]
        self._speed = _middle([ratio / self._corrections.get(size, 1.0) for size, ratio in recent])
        if len(self._offs) >= RECENT:
            slow = sorted(self._offs)[int(SLOW * len(self._offs))]
            self.spread = min(max(slow, LEAST_SPREAD), MOST_SPREAD)

    def pack(self) -> Samples:
        return self._first

    def unpack(self, samples: Samples, n_features: int) -> None:
        for sample in samples:
            if len(sample) != n_features + 1 or not all(0 <= value < 1e9 for value in sample) or not sample[-1]:
                raise ValueError(f"a sample is {n_features} numbers and seconds, not {sample}")
        if samples:
            self._first = samples[:FIRST]
            self._shape = _fitted(self._first, self._main)

    def _plain(self, features: Features) -> float:
        return sum(coefficient * feature for coefficient, feature in zip(self._shape, features, strict=False))


def _middle(values: Collection[float]) -> float:
    """Mean of those that are no outliers; of few, the median."""
    return fmean(sorted(values)[OUTLIERS:-OUTLIERS]) if len(values) > 2 * OUTLIERS else median(values)


def _size(features: Features) -> int:
    """Units of about one size, by what most of their time depends on."""
    return int(features[1]).bit_length() if len(features) > 1 else 0


def _fitted(samples: Samples, main: int) -> tuple[float, ...]:
    """Coefficients of least relative errors, none of them negative; a sample that stands out counts little."""
    data = np.array(samples)
    rows = data[:, :-1] / data[:, -1:]
    weights = np.ones(len(rows))
    for _ in range(ROUNDS):
        shape = _non_negative(rows, weights, main)
        weights = 1 / np.maximum(np.abs(rows @ shape - 1), LEAST_ERROR)
    return tuple(shape.tolist())


def _non_negative(rows: NDArray[np.float64], weights: NDArray[np.float64], main: int) -> NDArray[np.float64]:
    """Coefficients with which each row adds up to 1, as far as it goes; the most negative is left out, till none is."""
    weights = weights / weights.sum()
    target = np.append(np.sqrt(weights), np.zeros(rows.shape[1]))
    scaled = rows * np.sqrt(weights)[:, None]
    used = [column for column in range(rows.shape[1]) if scaled[:, column].any()]
    shape = np.zeros(rows.shape[1])
    while used:
        lengths = np.linalg.norm(scaled[:, used], axis=0)
        ridge = np.diag(np.where(np.arange(rows.shape[1]) == main, 0, RIDGE))[:, used]
        found, *_ = np.linalg.lstsq(np.vstack([scaled[:, used] / lengths, ridge]), target, rcond=None)
        if (found >= 0).all():
            shape[used] = found / lengths
            break
        used.pop(int(found.argmin()))
    return shape
