"""One answer in the making: draws tokens, turns them into text, advances the state. One step, one token.

Knows no clock: whoever drives it checks its deadline between steps.
"""

from collections.abc import Collection
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from iotd.events import FinishReason, Sampling
from iotd.model.decoder import Decoder
from iotd.model.sampling import Sampler
from iotd.model.state import State

Floats = NDArray[np.float32]


class TextStream(Protocol):
    """Tokens to text, holding back a character until all of its bytes are there."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class Generation:
    """Continues `state`, whose last logits are given, until the turn ends."""

    def __init__(
        self,
        decoder: Decoder,
        state: State,
        logits: Floats,
        sampling: Sampling,
        text: TextStream,
        eos_token_ids: Collection[int],
    ) -> None:
        self.n_tokens = 0
        """Tokens drawn, the one that ended the turn not counted."""
        self.finish_reason: FinishReason | None = None
        self._decoder = decoder
        self._state = state
        self._logits = logits
        self._sampler = Sampler(sampling)
        self._max_tokens = sampling.max_tokens
        self._text = text
        self._stops = StopStrings(sampling.stop)
        self._eos = eos_token_ids
        self._pending: int | None = None

    @property
    def unread(self) -> list[int]:
        """The token drawn last, which the state has not read, unless it ended the turn."""
        return [] if self._pending is None else [self._pending]

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    def step(self) -> str:
        """Draw one token and return the text it completes, which may be empty.

        The token before it is read into the state first, so a piece of text never waits for the step after it.
        """
        if self._pending is not None:
            self._logits = self._decoder.step(self._state, self._pending)
        token = self._sampler.draw(self._logits)
        if token in self._eos:
            self._pending = None
            self.finish_reason = FinishReason.STOP
            return ""
        self._pending = token
        self.n_tokens += 1
        piece = self._stops.push(self._text.push(token))
        if self._stops.met:
            self.finish_reason = FinishReason.STOP
        elif self.n_tokens >= self._max_tokens or self._state.available < 1:
            self.finish_reason = FinishReason.LENGTH
        return piece

    def flush(self) -> str:
        """Text held back at the end: the start of a stop string that did not come, an unfinished character."""
        if self._stops.met:
            return ""
        return self._stops.push(self._text.flush()) + self._stops.flush()


class StopStrings:
    """Passes text through up to the first stop string, holding back what may become one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.met = False
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def push(self, text: str) -> str:
        """Text that is certainly before any stop string."""
        if self.met or not self._stops:
            return "" if self.met else text
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.met = True
            return self._held[: min(found)]
        keep = max(self._overlap(stop) for stop in self._stops)
        cut = len(self._held) - keep
        passed, self._held = self._held[:cut], self._held[cut:]
        return passed

    def flush(self) -> str:
        held, self._held = self._held, ""
        return "" if self.met else held

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if stop.startswith(self._held[-n:])), 0)
