"""How long answers usually come to be, which tells what to keep for one that waits. Knows no model and no clock."""

from collections import deque
from typing import Literal

Answers = Literal["text", "form", "labels"]
"""Kinds of answers: free, of a given form, and labels weighed."""
SEEN = 64
"""Answers of a kind that are looked at, the last ones."""
USUAL = 0.9
"""Of them are no longer than what is usual."""
MEMORY = 0.2
"""Of the newest answer, in the tokens of a run."""
AT_FIRST = {"text": 24, "form": 8, "labels": 0}
MOST_SENTENCE = 32
"""Tokens: a model that ends none does not have all the time kept for it."""


class Lengths:
    """Learns on the model's thread; any thread may ask. Answers of a given form count in runs, others in tokens."""

    def __init__(self) -> None:
        self._seen = {kind: deque([(n, True)], maxlen=SEEN) for kind, n in AT_FIRST.items()}
        self._usual = dict(AT_FIRST)
        self._sentences = deque([(AT_FIRST["text"], True)], maxlen=SEEN)
        self.sentence = AT_FIRST["text"]
        """Tokens to the end of an answer's first sentence, usually."""
        self.run_tokens = 2.0
        """Of a run in an answer of a given form, on the whole."""

    def usual(self, kind: Answers) -> int:
        return self._usual[kind]

    def learn(self, kind: Answers, n: int) -> None:
        """One more answer has come to its end by itself."""
        self._seen[kind].append((n, True))
        self._usual[kind] = _usual(self._seen[kind])

    def learn_sentence(self, n_tokens: int, *, whole: bool) -> None:
        """One more answer had so many tokens to its first sentence's end, or, not whole, to where it was cut off."""
        self._sentences.append((n_tokens, whole))
        self.sentence = min(_usual(self._sentences), MOST_SENTENCE)

    def learn_run(self, n_tokens: float) -> None:
        """One more answer of a given form had so many tokens a run."""
        self.run_tokens += MEMORY * (n_tokens - self.run_tokens)


def _usual(seen: deque[tuple[int, bool]]) -> int:
    """The quantile of lengths, some of which are known to be longer only (Kaplan and Meier, 1958); 1 at least."""
    longer, at_risk = 1.0, len(seen)
    for n, whole in sorted(seen, key=lambda each: (each[0], not each[1])):
        longer -= longer / at_risk * whole
        at_risk -= 1
        if longer <= 1 - USUAL:
            return max(1, n)
    return max(n for n, _ in seen)
