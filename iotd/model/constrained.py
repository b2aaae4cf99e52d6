"""An answer in the making that keeps to a form, and is valid wherever it ends. Knows no clock, as its parent."""

from collections.abc import Collection
from dataclasses import replace

from iotd.events import FinishReason, Sampling
from iotd.model.decoder import Decoder
from iotd.model.generation import GUESS_COST, Floats, Generation, TextStream
from iotd.model.grammar import Constraint
from iotd.model.state import State


class ConstrainedGeneration(Generation):
    """Draws among the tokens that the constraint allows; what it forces is said undrawn, and read in one run.

    A forced text is cut into tokens as the tokenizer does it, where a model may spell it otherwise. There is no
    drafting: forced tokens are the safer draft. And no penalty is taken off what was said before: brackets, quotes and
    digits come again by nature.
    """

    def __init__(
        self,
        decoder: Decoder,
        state: State,
        logits: Floats,
        sampling: Sampling,
        text: TextStream,
        eos_token_ids: Collection[int],
        constraint: Constraint,
    ) -> None:
        super().__init__(decoder, state, logits, replace(sampling, presence_penalty=0.0, stop=()), text, eos_token_ids)
        self._constraint = constraint
        self._n_drawn = 0

    @property
    def run_tokens(self) -> float:
        return 1 + GUESS_COST * (len(self.unread) - 1) if self._n_drawn else 0.0

    def step(self, *, guess: bool = True) -> str:
        """Run the model once, draw one token, and return its text with all that is forced around it."""
        text = ""
        if self._logits is not None:
            text = self._say_forced()
            if self.unread:
                self._logits = None
        if self.done:
            return text
        allowed = self._constraint.allowed()
        if not len(allowed):
            return text + self._end(FinishReason.LENGTH)
        (logits,) = self._read([], only=allowed)
        token = int(allowed[self._sampler.draw(logits[allowed])])
        self._n_drawn += 1
        return text + self._say([token]) + self._say_forced()

    @property
    def ending(self) -> str:
        return self._text.peek(self._constraint.closing) if self._n_drawn and not self.done else ""

    def close(self) -> str:
        """A short rest of an answer from here; nothing where the model has not chosen anything yet."""
        return self._append(self._constraint.closing) if self._n_drawn else ""

    def _say_forced(self) -> str:
        text = ""
        while not self.done and (forced := self._constraint.forced()):
            text += self._say(forced)
        return text

    def _say(self, tokens: list[int]) -> str:
        """Say allowed tokens, or close where there is no room to go on by them."""
        if tokens[0] in self._eos:
            self.finish_reason = FinishReason.STOP
            return ""
        if not self._constraint.take(tokens, self._max_tokens - self.n_tokens - len(tokens)):
            return self._end(FinishReason.LENGTH)
        text = self._append(tokens)
        if self._constraint.ended:
            self.finish_reason = FinishReason.STOP
        elif self.n_tokens >= self._max_tokens or self.state.available < len(self.unread):
            text += self._end(FinishReason.LENGTH)
        return text

    def _end(self, reason: FinishReason) -> str:
        self.finish_reason = reason
        return self._append(self._constraint.closing)

    def _append(self, tokens: list[int]) -> str:
        self.unread += tokens
        self.n_tokens += len(tokens)
        return "".join(map(self._text.push, tokens))
