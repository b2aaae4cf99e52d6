"""How long answers usually come to be, which tells what to keep for one that waits. Knows no model and no clock."""

from collections import deque
from typing import Literal

Answers = Literal["text", "form", "labels"]
"""Kinds of answers: free, of a given form, and labels weighed."""
SEEN = 32
"""Answers of a kind that are looked at, the last ones."""
USUAL = 0.9
"""Of them are no longer than what is usual."""
MEMORY = 0.2
"""Of the newest answer, in the tokens of a run."""
AT_FIRST = {"text": 24, "form": 8, "labels": 0}


class Lengths:
    """Learns on the model's thread; any thread may ask. Answers of a given form count in runs, others in tokens."""

    def __init__(self) -> None:
        self._seen = {kind: deque([n], maxlen=SEEN) for kind, n in AT_FIRST.items()}
        self._usual = dict(AT_FIRST)
        self.run_tokens = 2.0
        """Of a run in an answer of a given form, on the whole."""

    def usual(self, kind: Answers) -> int:
        return self._usual[kind]

    def learn_run(self, n_tokens: float) -> None:
        """One more answer of a given form had so many tokens a run."""
        self.run_tokens += MEMORY * (n_tokens - self.run_tokens)

    def learn(self, kind: Answers, n: int) -> None:
        """One more answer has come to its end by itself."""
        seen = self._seen[kind]
        seen.append(n)
        self._usual[kind] = max(1, sorted(seen)[int(USUAL * (len(seen) - 1))])
