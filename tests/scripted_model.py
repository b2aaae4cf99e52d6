"""A stand-in for the model that writes what a test gives it."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from fake_model import EOS, VOCAB, FakeModel, FakeState, Floats

from iotd.model.generation import Generation


class ScriptedModel(FakeModel):
    """Draws these tokens after every prompt, and then ends its turn."""

    def __init__(self, tokens: Iterable[int]) -> None:
        super().__init__()
        self.tokens = list(tokens)
        self.n_drawn = 0

    def logits(self, state: FakeState) -> Floats:
        found = np.zeros(VOCAB, np.float32)
        found[self.tokens[self.n_drawn] if self.n_drawn < len(self.tokens) else EOS] = 30  # whatever the haste
        return found

    def generation(self, state: FakeState, logits: Floats, *args: Any, **options: Any) -> Generation:
        self.n_drawn = 0
        return super().generation(state, self.logits(state), *args, **options)

    def _run(self, *args: Any) -> Floats | None:
        self.n_drawn += 1
        return super()._run(*args)
