"""How things end in a model's tokens: its turn, and its thoughts. Knows no state and no sampling."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

from iotd.model.chat import ChatTemplate
from iotd.model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Endings:
    """Of one model."""

    turn: frozenset[int]
    """Each of them ends the turn."""
    thought: tuple[int, ...]
    """What the template has between thoughts and answer, in Qwen3.5 a line break, `</think>` and two more; nothing
    where it does not tell them apart."""
    thought_end: int | None
    """The one of these that is a control token, by which the model itself ends its thoughts."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, chat: ChatTemplate, eos_token_ids: Collection[int]) -> Self:
        thought = tokenizer.encode(chat.thought_end, special=True)
        controls = [token for token in thought if token in tokenizer.control_ids]
        if not controls:
            return cls(frozenset(eos_token_ids), (), None)
        return cls(frozenset(eos_token_ids), tuple(thought), controls[-1])
