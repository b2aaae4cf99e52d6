"""Notices by its tokens that a text goes round in circles, as a small model may do up to the end of its budget."""

import numpy as np

LONGEST = 64
"""Tokens of a circle: two or three sentences. Longer ones are seldom, and take long to be sure of."""
ROUNDS = 3
"""A circle has been gone round so often. Twice may be meant: a phrase taken up again, two readings that are alike."""
LEAST = 48
"""Tokens that a circle's rounds span, so that short ones need more of them: a value that stayed the same for a dozen
readings, a line of a table and a row of zeros in it are no circles."""
_PERIODS = np.arange(1, LONGEST + 1)
_ENOUGH = np.maximum(ROUNDS * _PERIODS, LEAST) - _PERIODS
"""For each period, the tokens in a row that are equal to those a period before."""


class Repetition:
    """Of one text."""

    def __init__(self) -> None:
        self._last = np.full(LONGEST, -1)
        """The newest first."""
        self._n_equal = np.zeros(LONGEST, np.int64)

    def push(self, token: int) -> bool:
        """Take in the next token. True where the text goes round in circles; takes about 10 µs."""
        self._n_equal = (self._n_equal + 1) * (self._last == token)
        self._last[1:] = self._last[:-1]
        self._last[0] = token
        return bool((self._n_equal >= _ENOUGH).any())
