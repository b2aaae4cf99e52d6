"""Calibration sequences: so many tokens, spread evenly over the kinds of text."""

import random
from collections.abc import Iterable
from collections.abc import Sequence as Series
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iotd.config import DEFAULT_SYSTEM
from iotd.convert.samples.blocks import Part
from iotd.convert.samples.chats import Writer
from iotd.convert.samples.own import split, windows
from iotd.convert.samples.passages import languages, packed, registers
from iotd.errors import InvalidInput
from iotd.model.chat import ChatTemplate
from iotd.model.tokenizer import Tokenizer

KINDS = ("prose", "languages", "sensor", "chat")
"""English in many registers; other languages; lines of sensors; questions about them, and others, with answers."""
OWN = "own"
"""The kind of the user's lines."""
_OWN_SHARE = 1 / 3
_HELD_SHARE = 1 / 4
"""Tokens that are held back, of those that are fitted to."""
_SHARES: dict[Part, dict[str, float]] = {
    "fit": {"prose": 1 / 2, "languages": 1 / 6},
    "held": {"prose": 1 / 4, "languages": 1 / 4},
}
"""Of the tokens that are not the user's; the other kinds halve the rest. English says most of what channels do."""
_LEAST_LENGTH = 32


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """Token ids that the model reads from an empty state."""

    kind: str
    """One of KINDS, or OWN."""
    ids: NDArray[np.int64]
    """[T]."""


@dataclass(frozen=True, slots=True)
class Texts:
    """What weights are fitted to, and what the result is measured on."""

    fit: list[Sequence]
    held: list[Sequence]


def sequences(
    tokenizer: Tokenizer,
    chat: ChatTemplate | None,
    *,
    length: int = 512,
    n_tokens: int = 16384,
    seed: int = 0,
    extra: Iterable[str] = (),
) -> Texts:
    """Sequences of `length` tokens for one model: `n_tokens` in all to fit to, and a quarter as many held back.

    chat: None for a model without a chat template. extra: the user's own lines, as the context has them; they take a
    third of the tokens. Where `n_tokens` is too few for a sequence of each kind, all sequences are shorter. Raises
    InvalidInput where that makes them shorter than 32 tokens, or the user's lines too few for one.
    """
    lines = [line.rstrip("\r\n") for line in extra if line.strip()]
    fit, held = split(lines)
    least = _LEAST_LENGTH * (len(KINDS) + bool(lines))
    if length < _LEAST_LENGTH or int(n_tokens * _HELD_SHARE) < least:
        raise InvalidInput(
            f"{n_tokens} tokens in sequences of {length}: at least {int(least / _HELD_SHARE)} in sequences of "
            f"{_LEAST_LENGTH} are needed",
            field="calibration",
        )
    return Texts(
        fit=_Maker("fit", tokenizer, chat, length, n_tokens, seed).sequences(fit if lines else None),
        held=_Maker("held", tokenizer, chat, length, int(n_tokens * _HELD_SHARE), seed).sequences(
            held if lines else None
        ),
    )


class _Maker:
    """Makes the sequences of one part of the texts."""

    def __init__(
        self, part: Part, tokenizer: Tokenizer, chat: ChatTemplate | None, length: int, n_tokens: int, seed: int
    ) -> None:
        self._part: Part = part
        self._tokenizer = tokenizer
        self._chat = chat
        self._length = length
        self._n_tokens = n_tokens
        self._seed = seed

    def sequences(self, own: Series[str] | None) -> list[Sequence]:
        """own: the user's lines, if any."""
        n_kinds = len(KINDS) + (own is not None)
        length = min(self._length, self._n_tokens // n_kinds)
        n = self._n_tokens // length
        writer = Writer(self._tokenizer, self._chat, self._part, length)
        made = {OWN: self._own(own, writer, n, length)} if own is not None else {}
        n_more, shares = n - len(made.get(OWN, [])) - len(KINDS), _SHARES[self._part]
        for kind, groups in (("prose", registers), ("languages", languages)):
            most = 1 + int(n_more * shares[kind])
            texts = packed(groups(self._part), self._tokenizer, self._random(kind), n_sequences=most, length=length)
            made[kind] = [*texts]
        rest = n - sum(map(len, made.values()))  # where the texts end, more lines follow
        made["sensor"] = [*writer.sensor_lines(self._random("sensor"), rest // 2)]
        made["chat"] = [*writer.conversations(self._random("chat"), rest - rest // 2)]
        return [Sequence(kind, np.array(ids, np.int64)) for kind in (*KINDS, OWN) for ids in made.get(kind, [])]

    def _own(self, lines: Series[str], writer: Writer, n: int, length: int) -> list[list[int]]:
        n_sequences = min(max(1, round(n * _OWN_SHARE)), n - len(KINDS))
        opening = writer.opening(DEFAULT_SYSTEM)
        return [*windows(lines, self._tokenizer, opening, n_sequences=n_sequences, length=length)]

    def _random(self, kind: str) -> random.Random:
        return random.Random(f"{self._seed} {self._part} {kind}")
