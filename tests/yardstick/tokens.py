"""The tokenizers of the yardstick's models, from the metadata of their GGUF files.

Knows no weights.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from yardstick.sources import Source

CONTROL, USER_DEFINED = 3, 4  # of GGUF's token types


def open_tokenizer(source: Source) -> Tokenizer:
    """The tokenizer that a GGUF file describes, of the two kinds that the yardstick's models have."""
    build = {"gpt2": _byte_level, "llama": _sentencepiece}[source.field("tokenizer.ggml.model")]
    tokenizer = build(source)
    tokens = source.field("tokenizer.ggml.tokens")
    kinds = source.field("tokenizer.ggml.token_type")
    tokenizer.add_special_tokens(_added(tokens, kinds, CONTROL, special=True))
    tokenizer.add_tokens(_added(tokens, kinds, USER_DEFINED, special=False))
    return tokenizer


@dataclass(frozen=True, slots=True)
class Calibrating:
    """A tokenizer as texts and calibration ask it: control tokens in a text are plain characters."""

    tokenizer: Tokenizer
    first: tuple[int, ...]
    """What a sequence begins with: the token for the beginning of a text, where the model wants one."""

    @classmethod
    def of(cls, source: Source, tokenizer: Tokenizer) -> "Calibrating":
        begins = source.field("tokenizer.ggml.add_bos_token")
        return cls(tokenizer, (source.field("tokenizer.ggml.bos_token_id"),) if begins else ())

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Without what a sequence begins with."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_parts(self, parts: Iterable[tuple[str, bool]]) -> list[int]:
        return self.encode("".join(text for text, _ in parts))

    def token_bytes(self, token: int) -> bytes:
        return self.tokenizer.decode([token], skip_special_tokens=False).encode()

    def begun(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """As many tokens, the first ones of which are those that a sequence begins with."""
        return np.concatenate([self.first, ids[: len(ids) - len(self.first)]]).astype(np.int64)


def _added(tokens: list[str], kinds: list[int], wanted: int, *, special: bool) -> list[AddedToken]:
    found = [token for token, kind in zip(tokens, kinds, strict=True) if kind == wanted]
    return [AddedToken(token, special=special, normalized=False) for token in found]


def _byte_level(source: Source) -> Tokenizer:
    """SmolLM2's: bytes as letters, digits one by one."""
    vocab = _vocab(source)
    merges = [tuple(merge.split(" ")) for merge in source.field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(source: Source) -> Tokenizer:
    """Gemma's: spaces as a letter, unknown letters as bytes; merges follow from the tokens' scores."""
    vocab = _vocab(source)
    scores = source.field("tokenizer.ggml.scores")
    best_first = sorted(vocab, key=lambda token: -scores[vocab[token]])
    merges = list(_merges(best_first, vocab))
    model = models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _merges(best_first: Iterable[str], vocab: dict[str, int]) -> Iterator[tuple[str, str]]:
    """The pairs of tokens that make up a token, best token first."""
    for token in best_first:
        cuts = ((token[:k], token[k:]) for k in range(1, len(token)))
        found = [(left, right) for left, right in cuts if left in vocab and right in vocab]
        yield from sorted(found, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))


def _vocab(source: Source) -> dict[str, int]:
    return {token: n for n, token in enumerate(source.field("tokenizer.ggml.tokens"))}
