"""One answer in the making: draws tokens, turns them into text, advances the state. One step, one run of the model.

Knows no clock: whoever drives it checks its deadline between steps.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from iotd.events import FinishReason, Sampling
from iotd.model.decoder import Decoder
from iotd.model.endings import ELLIPSIS, TAIL, Endings, ends_in_number, ends_sentence
from iotd.model.head import MOST_ROWS
from iotd.model.lookup import Lookup
from iotd.model.repetition import Repetition
from iotd.model.sampling import Sampler
from iotd.model.state import State

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
GUESS_COST = 0.4
"""What a token more in a run takes, against a run of one token: 0.34 to 0.41 with the 0.8B's shape on x86-64."""
MEMORY = 0.3
"""Of the newest guess, in how often guesses are right."""
MOST_BIAS = 8.0
"""Added in all haste to the logits of what ends a sentence: an end that the model gives one chance in 3,000 then has an
even one. Of the demo model's tokens within sentences (387), 5 had an end nearer than that, all in one answer that had
lost its thread; most were 11 to 18 away."""
TRY_AGAIN_TOKENS = 16
"""After so many tokens without a guess, one is made."""


class TextStream(Protocol):
    """Tokens to text, holding back a character until all of its bytes are there."""

    def push(self, token: int) -> str: ...

    def peek(self, tokens: Iterable[int]) -> str:
        """The text that would come with these tokens, to its very end."""

    def flush(self) -> str: ...


class Said(NamedTuple):
    """Text that became complete; where there are both, the thought comes first."""

    answer: str = ""
    thought: str = ""


@dataclass(frozen=True, slots=True)
class Drafting:
    """What it takes to read several tokens in one run: a guess at them, and a state to read them into."""

    lookup: Lookup
    beside: State
    """Without rows of its own; it works in those of the answer's state."""


class Generation:
    """Continues `state`, whose last logits are given, until the turn ends.

    With `sampling.thinking` it begins inside of a thought that the prompt has opened. Stop strings count in the answer
    alone, as does what ends an answer: the end of the turn, or a repetition, ends only the thought where it is in one.
    """

    def __init__(
        self,
        decoder: Decoder,
        state: State,
        logits: Floats,
        sampling: Sampling,
        text: TextStream,
        endings: Endings,
        drafting: Drafting | None = None,
    ) -> None:
        self.n_tokens = 0
        """Tokens of thoughts and answer, the one that ended the turn not counted."""
        self.n_thinking_tokens = 0
        """Those of thoughts among them, with what stands between thoughts and answer."""
        self.thinking = sampling.thinking and bool(endings.thought)
        """The answer has not begun."""
        self.finish_reason: FinishReason | None = None
        self.haste = 0.0
        """How near the end is, from 0 to 1: the nearer, the more the model is led to end its sentence and its turn, at
        a place where it might. Of no effect on thoughts."""
        self.state = state
        """What has read all but `unread`: with drafting, the given state or the one beside it."""
        self.tokens: list[int] = []
        """All that were drawn or written so far, the one that ended the turn not among them."""
        self.unread: list[int] = []
        """The last tokens, which the state has not read; one that ended the turn is not among them."""
        self._decoder = decoder
        self._logits: Floats | None = logits
        self._sampler = Sampler(sampling, endings.digits, thinking=self.thinking)
        self._max_tokens = sampling.max_tokens
        self._text = text
        self._stops = StopStrings(sampling.stop)
        self._repetition = Repetition()
        self._endings = endings
        self._drafting = drafting
        self._beside = drafting.beside if drafting else None
        self._reach = _Reach()
        self._answer = self._thought = ""
        """Complete, and not told yet."""
        self._at_start = self.thinking
        """White space is left out: it parts the answer from the thoughts."""
        self._tail = ""
        """The end of the answer's text."""

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    def step(self, *, guess: bool = True) -> Said:
        """Run the model once, draw one token or more, and return the text they complete, which may be empty.

        The tokens before are read into the state first, so a piece of text never waits for the run after it. A draft
        only saves runs: tokens are drawn from the model's own logits, and it counts as far as they agree with it.
        guess: False keeps the run short.
        """
        if self.done:
            return self._told()
        draft = self._draft() if guess and self._logits is None else []
        n_unread, n_agreed = len(self.unread), 0
        for n_agreed, logits in enumerate(self._read(draft)):
            thinking, token = self.thinking, self._draw(logits)
            self._take(token)
            turned = self.done or self.thinking is not thinking
            if turned or n_agreed == len(draft) or token != draft[n_agreed]:
                break
        if draft:
            self._reach.learn(n_agreed, len(draft))
            if n_agreed == len(draft):
                self._change_over(n_unread + n_agreed)
        return self._told()

    def end_thought(self) -> None:
        """Have the answer begin at the next step, whatever was still to be thought (budget forcing: Muennighoff et al.,
        s1, 2025). What ends the thought is read in that step's run.

        Nothing happens where it does not think; where there is no room for an answer, it is done.
        """
        if self.thinking and not self.done:
            self._begin_answer(self._endings.thought)

    def conclude(self) -> Said:
        """The step for which alone there is time left: end the sentence, and be done.

        The model gets one token more, in all haste. What is not whole behind it breaks off with an ellipsis: a full
        stop would say that it was whole, and "It is 23." cut out of "It is 23.4 °C" would be false. Behind a whole
        sentence that token only tells whether the answer is at its end.
        """
        self.end_thought()
        if not self.done:
            whole = ends_sentence(self._tail)
            self.haste = float(not whole)
            (logits,) = self._read([])
            token = self._draw(logits)
            if not whole or token in self._endings.turn:
                self._take(token)
        if not self.done:
            self._text.flush()  # half a character is no text
            if not ends_sentence(self._tail):
                self._write(self._endings.ellipsis)
            self.finish_reason = FinishReason.BUDGET
        return self._told()

    def _draw(self, logits: Floats) -> int:
        """A token, led towards the end by haste; not where nothing was said so far, or a number may go on."""
        if self.haste and not self.thinking and self._tail.strip() and not ends_in_number(self._tail):
            logits = logits.copy()
            logits[list(self._endings.turn)] += self.haste * MOST_BIAS
            if not ends_sentence(self._tail):
                logits[self._endings.sentence] += self.haste * MOST_BIAS
        return self._sampler.draw(logits)

    def _draft(self) -> list[int]:
        """A guess at what follows the unread tokens."""
        if self._drafting is None:
            return []
        room = min(MOST_ROWS, self.state.available) - len(self.unread)
        most = min(self._reach.next(), room, self._max_tokens - self.n_tokens - 1)
        return self._drafting.lookup.draft(most) if most > 0 else []

    def _read(self, draft: list[int], only: Ints | None = None) -> Iterable[Floats]:
        """Logits after the unread tokens, and after each of the draft; of `only` some tokens, if no others count."""
        if self._logits is not None:
            logits, self._logits = self._logits, None
            return [logits]
        if draft:
            assert self._beside is not None
            return self._decoder.verify(self.state, self._beside, self.unread + draft, len(draft) + 1)
        unread, self.unread = self.unread, []
        if len(unread) == 1:
            return [self._decoder.step(self.state, unread[0], only=only)]
        found = self._decoder.prefill(self.state, unread, only=only)
        assert found is not None
        return [found]

    def _take(self, token: int) -> None:
        """A token was drawn: what it says, or ends."""
        if self.thinking and token == self._endings.thought_end:
            thought = self._endings.thought
            self._begin_answer(thought[thought.index(token) :])
        elif token in self._endings.turn:
            self._end(FinishReason.STOP)
        else:
            self._write([token])
            if self._stops.met:
                self.finish_reason = FinishReason.STOP
            elif self._repetition.push(token):
                self._end(FinishReason.REPETITION)
            elif not self._has_room():
                self.finish_reason = FinishReason.LENGTH

    def _end(self, reason: FinishReason) -> None:
        """The thought, or the answer."""
        if self.thinking:
            self.end_thought()
        else:
            self.finish_reason = reason

    def _begin_answer(self, tokens: Sequence[int]) -> None:
        """These tokens end the thought."""
        if not self._has_room(len(tokens)):
            self.finish_reason = FinishReason.LENGTH
            return
        self._hear(self._text.flush())
        self._add(tokens)
        self._logits = None
        self._repetition = Repetition()
        self._sampler.begin_answer()
        self.thinking = False

    def _write(self, tokens: Sequence[int]) -> None:
        self._add(tokens)
        for token in tokens:
            self._hear(self._text.push(token))

    def _add(self, tokens: Sequence[int]) -> None:
        self.tokens += tokens
        self.unread += tokens
        self.n_tokens += len(tokens)
        self.n_thinking_tokens += len(tokens) * self.thinking
        if self._drafting is not None:
            self._drafting.lookup.extend(tokens)

    def _has_room(self, n_tokens: int = 0) -> bool:
        """Behind so many tokens more, another can be drawn."""
        return self.n_tokens + n_tokens < self._max_tokens and self.state.available >= len(self.unread) + n_tokens

    def _hear(self, text: str) -> None:
        if self.thinking:
            self._thought += text
            return
        if self._at_start:
            text = text.lstrip()
            self._at_start = not text
        self._tail = (self._tail + text)[-TAIL:]
        self._answer += self._stops.push(text)

    def _told(self) -> Said:
        """What became complete since it was last asked for."""
        said = Said(self._answer, self._thought)
        self._answer = self._thought = ""
        return said

    def _change_over(self, n_read: int) -> None:
        """The state beside has read so many of the unread tokens, and goes on in this one's place."""
        assert self._beside is not None
        self.state, self._beside = self._beside, self.state
        self.state.take_rows()
        del self.unread[:n_read]

    @property
    def ending(self) -> str:
        """What would make the answer whole, were it cut off here; it may be asked for at any time."""
        return ELLIPSIS if self._tail.strip() and not ends_sentence(self._tail) else ""

    def close(self) -> Said:
        """Text that makes a cut answer whole; free text needs none."""
        return Said()

    def flush(self) -> Said:
        """Text held back at the end: the start of a stop string that did not come, an unfinished character."""
        self._hear(self._text.flush())
        self._answer += self._stops.flush()
        return self._told()


class _Reach:
    """How many tokens to guess at: as many as pay, by how often the guesses of this answer were right."""

    def __init__(self) -> None:
        self._right = 0.7
        self._n_idle = 0

    def next(self) -> int:
        best = max(range(MOST_ROWS), key=self._gain)
        if best:
            return best
        self._n_idle += 1
        return int(self._n_idle % TRY_AGAIN_TOKENS == 0)

    def learn(self, n_agreed: int, n_guessed: int) -> None:
        """What was guessed behind a wrong token says nothing."""
        for right in [1.0] * n_agreed + [0.0] * (n_agreed < n_guessed):
            self._right += MEMORY * (right - self._right)

    def _gain(self, n: int) -> float:
        """Tokens to be expected of a run with so many guesses, for the time of one token."""
        return sum(self._right**k for k in range(n + 1)) / (1 + n * GUESS_COST)


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
