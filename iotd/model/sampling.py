"""Draws the next token from logits. Penalty, temperature, top-k and top-p are applied in that order, as vLLM does."""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iotd.errors import InvalidInput
from iotd.events import Draw, Sampling

Floats = NDArray[np.float32]
BLOCK = 256
CROWDED = 4
"""Groups for each value that is looked for: few of them hold two."""
GREEDY_TEMPERATURE = 1e-5
LEAST = float(np.finfo(np.float32).min)
THOUGHTS = Draw(temperature=1.0, top_p=0.95, top_k=20, presence_penalty=1.5)
"""By the model card of Qwen3.5, as is the next."""
THOUGHTS_OF_IMAGES = Draw(temperature=0.6, top_p=0.95, top_k=20, presence_penalty=0.0)


def sampling_of(defaults: Sampling, given: Mapping[str, Any], *, images: bool) -> Sampling:
    """The defaults but for what is given by name, which holds for thoughts, too; else these are drawn by the card.

    images: the question is asked about some. Raises InvalidInput naming an option that is out of its range.
    """
    sampling = replace(defaults, **given)
    check_sampling(sampling)
    if not sampling.thinking:
        return sampling
    card = THOUGHTS_OF_IMAGES if images else THOUGHTS
    return replace(sampling, thoughts=replace(card, **{key: given[key] for key in Draw.__slots__ if key in given}))


class Sampler:
    """A sampler for one answer: it remembers which tokens it has drawn."""

    def __init__(self, sampling: Sampling, spared: Collection[int] = (), *, thinking: bool = False) -> None:
        """spared: tokens that no penalty is taken off. thinking: it begins with a thought."""
        self._answer = sampling
        self._how: Sampling | Draw = sampling.thoughts or sampling if thinking else sampling
        self._random = np.random.default_rng(sampling.seed)
        self._spared = spared
        self._drawn: set[int] = set()

    def begin_answer(self) -> None:
        """What it has drawn was a thought, and its answer may say it again."""
        self._how = self._answer
        self._drawn.clear()

    def draw(self, logits: Floats) -> int:
        """A token id from float32 [V] logits, which are left as they are."""
        token = self._choose(self._penalised(logits))
        if token not in self._spared:
            self._drawn.add(token)
        return token

    def _penalised(self, logits: Floats) -> Floats:
        if not self._drawn or self._how.presence_penalty == 0:
            return logits
        penalised = logits.copy()
        penalised[list(self._drawn)] -= self._how.presence_penalty
        return penalised

    def _choose(self, logits: Floats) -> int:
        how = self._how
        if how.temperature < GREEDY_TEMPERATURE or how.top_k == 1:
            return int(logits.argmax())
        candidates = top_k(logits, how.top_k or len(logits))
        scaled = logits[candidates].astype(np.float64) / how.temperature
        odds = np.exp(scaled - scaled[0])
        odds /= odds.sum()
        keep = max(1, int(np.searchsorted(np.cumsum(odds), how.top_p) + 1))
        cumulative = np.cumsum(odds[:keep])
        return int(candidates[np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")])


def check_sampling(sampling: Sampling) -> None:
    """Raises InvalidInput naming the option that is out of its range."""
    for name, good, allowed in (
        ("max_tokens", sampling.max_tokens >= 1, "at least 1"),
        ("temperature", 0 <= sampling.temperature < math.inf, "0 or more"),
        ("top_p", 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("top_k", sampling.top_k >= 0, "0 or more"),
        ("presence_penalty", -2 <= sampling.presence_penalty <= 2, "from -2 to 2"),
        ("seed", sampling.seed is None or sampling.seed >= 0, "0 or more"),
    ):
        if not good:
            raise InvalidInput(f"{name} is {getattr(sampling, name)}: it must be {allowed}", field=f"sampling.{name}")


def top_k(logits: Floats, k: int) -> NDArray[np.intp]:
    """Indices of the k largest of float32 [V], largest first; those of −∞ are left out."""
    candidates = np.flatnonzero(logits >= max(nth_largest(logits, k), LEAST))
    order = np.argsort(-logits[candidates], kind="stable")[:k]
    return candidates[order]


def nth_largest(values: Floats, n: int) -> float:
    """About that: at least n values are as large. It is the n-th largest maximum of a group, which takes one pass."""
    if n >= len(values):
        return -np.inf
    groups = max(len(values) // BLOCK, CROWDED * n)
    size = len(values) // groups
    if size > 1:
        values = values[: size * groups].reshape(size, groups).max(axis=0)
    return float(np.partition(values, -n)[-n])
