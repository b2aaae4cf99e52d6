"""How things end: a sentence in its text, and in a model's tokens its turn, its sentences and its thoughts.

Knows no state and no sampling.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import product
from typing import Self

import numpy as np
from numpy.typing import NDArray

from iotd.model.chat import ChatTemplate
from iotd.model.tokenizer import Tokenizer

Ints = NDArray[np.int64]
TAIL = 32
"""Characters at the end of a text that tell whether its sentence has ended."""
ELLIPSIS = "…"
_MARKS = (".", "!", "?", ELLIPSIS, "。", "！", "？", "...", "?!", "!!")
_BEFORE = ("", ")", '"')
_BEHIND = ("", ")", '"', "”", "**")
_BREAKS = ("", "\n", "\n\n")
_CLOSING = r"[\"'”’」』）)\]*]*"
_WHOLE = re.compile(rf"(?:(?:(?<!\d)\.|[!?…。！？])[.!?…]*{_CLOSING}|[^\s:,;]\s*\n)\s*\Z")
_NUMBER = re.compile(r"\d[-.,:/]?\Z")
SENTENCE_END = re.compile(rf"(?:(?:[.!?…]+{_CLOSING}(?=\s)|[。！？]+{_CLOSING})\s*|(?<![\s:,;])\s*\n\s*)")
"""In a text that goes on, with the white space behind it: a point inside of a number or a name has none."""


def ends_sentence(text: str) -> bool:
    """Nothing half stands at its end. A point behind a digit may be a decimal one, and a line that ends with a colon is
    to be gone on with."""
    return _WHOLE.search(text[-TAIL:]) is not None


def ends_in_number(text: str) -> bool:
    """More digits may follow: of a decimal, a time, a date."""
    return _NUMBER.search(text) is not None


@dataclass(frozen=True, slots=True, eq=False)
class Endings:
    """Of one model."""

    turn: frozenset[int]
    """Each of them ends the turn."""
    sentence: Ints
    """int64 [n]: each of them ends a sentence: a mark, with brackets, quotes or line breaks around it."""
    ellipsis: tuple[int, ...]
    """Say that the text breaks off."""
    thought: tuple[int, ...]
    """What the template has between thoughts and answer, in Qwen3.5 a line break, `</think>` and two more; nothing
    where it does not tell them apart."""
    thought_end: int | None
    """The one of these that is a control token, by which the model itself ends its thoughts."""
    digits: frozenset[int]
    """With which a number need not be at its end."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, chat: ChatTemplate, eos_token_ids: Collection[int]) -> Self:
        """Takes 10 to 20 ms: no answer should have to wait for it."""
        marks = map("".join, product(_BEFORE, _MARKS, _BEHIND, _BREAKS))
        sentence = {tokens[0] for tokens in map(tokenizer.encode, marks) if len(tokens) == 1}
        thought = tokenizer.encode(chat.thought_end, special=True)
        controls = [token for token in thought if token in tokenizer.control_ids]
        return cls(
            turn=frozenset(eos_token_ids),
            sentence=np.array(sorted(sentence), np.int64),
            ellipsis=tuple(tokenizer.encode(ELLIPSIS)),
            thought=tuple(thought) if controls else (),
            thought_end=controls[-1] if controls else None,
            digits=frozenset(token for digit in "0123456789" for token in tokenizer.encode(digit)),
        )
