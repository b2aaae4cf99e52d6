"""An answer in the making that keeps to a form, and is valid wherever it ends. Knows no clock, as its parent."""

from dataclasses import replace

from iotd.events import FinishReason, Sampling
from iotd.model.decoder import Decoder
from iotd.model.endings import Endings
from iotd.model.generation import Floats, Generation, Said, TextStream
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
        endings: Endings,
        constraint: Constraint,
    ) -> None:
        plain = replace(sampling, presence_penalty=0.0, stop=(), thinking=False)
        super().__init__(decoder, state, logits, plain, text, endings)
        self._constraint = constraint
        self._n_drawn = 0

    def step(self, *, guess: bool = True) -> Said:
        """Run the model once, draw one token, and return its text with all that is forced around it."""
        if self._logits is not None:
            self._say_forced()
            if self.unread:
                self._logits = None
        if not self.done:
            self._draw_one()
            self._say_forced()
        return self._told()

    def conclude(self) -> Said:
        """Be closed: there is nothing to wait for."""
        said = self.close()
        self.finish_reason = self.finish_reason or FinishReason.BUDGET
        return said

    @property
    def ending(self) -> str:
        return self._text.peek(self._constraint.closing) if self._n_drawn and not self.done else ""

    def close(self) -> Said:
        """A short rest of an answer from here, once; nothing where the model has not chosen anything yet."""
        if self._n_drawn and not self.done:
            self._cut(FinishReason.BUDGET)
        return self._told()

    def _draw_one(self) -> None:
        allowed = self._constraint.allowed()
        if not len(allowed):
            self._cut(FinishReason.LENGTH)
            return
        (logits,) = self._read([], only=allowed)
        token = int(allowed[self._sampler.draw(logits[allowed])])
        self._n_drawn += 1
        self._say([token])

    def _say_forced(self) -> None:
        while not self.done and (forced := self._constraint.forced()):
            self._say(forced)

    def _say(self, tokens: list[int]) -> None:
        """Say allowed tokens, or close where there is no room to go on by them."""
        if tokens[0] in self._endings.turn:
            self.finish_reason = FinishReason.STOP
            return
        if not self._constraint.take(tokens, self._max_tokens - self.n_tokens - len(tokens)):
            self._cut(FinishReason.LENGTH)
            return
        self._write(tokens)
        if self._constraint.ended:
            self.finish_reason = FinishReason.STOP
        elif not self._has_room():
            self._cut(FinishReason.LENGTH)

    def _cut(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self._write(self._constraint.closing)
