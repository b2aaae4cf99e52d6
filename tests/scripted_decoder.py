"""Generations whose every token a test decides."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iotd.events import Sampling
from iotd.model import Model, State
from iotd.model.generation import Generation

Floats = NDArray[np.float32]


class Script:
    """Stands in for the decoder: makes a generation draw these tokens, one a run, and remembers what was read."""

    def __init__(self, model: Model, tokens: Iterable[int], below: Mapping[int, float] | None = None) -> None:
        """below: what other tokens' logits are below the drawn ones', which is 10 for the rest."""
        self.model = model
        self.below = below or {}
        self.read: list[int] = []
        self.n_runs = 0
        self.go_on(tokens, at=0)

    def go_on(self, tokens: Iterable[int], at: int = -1) -> None:
        """From the next run on, with these."""
        self.tokens, self._at = list(tokens), at

    def step(self, state: State, token: int, **options: Any) -> Floats:
        return self.prefill(state, [token], **options)

    def prefill(self, state: State, tokens: Sequence[int], **_: Any) -> Floats:
        self.read += tokens
        self.n_runs += 1
        state.position += len(tokens)
        self._at += 1
        return self._logits()

    def _logits(self) -> Floats:
        found = np.full(self.model.spec.vocab_size, -10.0, np.float32)
        for token, below in self.below.items():
            found[token] = -below
        found[self.tokens[self._at]] = 0
        return found

    def generation(self, capacity: int = 1000, **sampling: Any) -> Generation:
        options = Sampling(**{"temperature": 0.0, "presence_penalty": 0.0, **sampling})
        stream, state = self.model.tokenizer.stream(), self.model.new_state(capacity)
        return Generation(self, state, self._logits(), options, stream, self.model.endings)  # type: ignore[arg-type]


def pieces_of(generation: Generation) -> list[str]:
    pieces = []
    while not generation.done:
        pieces.append(generation.step().answer)
    return [*pieces, generation.flush().answer]


def told(generation: Generation) -> tuple[str, str]:
    """Thoughts and answer, whole."""
    said = []
    while not generation.done:
        said.append(generation.step())
    said.append(generation.flush())
    return "".join(each.thought for each in said), "".join(each.answer for each in said)
