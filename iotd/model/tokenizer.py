"""Text to token ids and back: byte-level BPE over memory-mapped tables.

Equal to the `tokenizers` library on every text, at a hundredth of its memory. Knows no conversation: `chat` does.
"""

import codecs
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from iotd.errors import PackageError
from iotd.model.merges import Merges
from iotd.model.normalizer import Normalizer
from iotd.model.pretokenizer import Pretokenizer
from iotd.model.tokenizer_file import TokenizerFile, read_tokenizer_file

_CACHED_WORDS = 8192
_CACHED_LENGTH = 32
"""Characters; longer words are rare, and would make the cache's size in bytes hard to bound."""


class Tokenizer:
    """A checkpoint's tokenizer. Safe to use from several threads."""

    def __init__(self, file: TokenizerFile) -> None:
        tables = file.tables
        self._bytes, self._offsets = tables["token_bytes"], tables["token_offsets"]
        self._byte_ids: list[int] = tables["byte_ids"].tolist()
        self._merges = Merges(*(tables[f"merge_{part}"] for part in ("starts", "rights", "ranks", "products")))
        self._normalizer = Normalizer(tables["nfc_starts"], tables["nfc_ends"])
        self._pretokenizer = Pretokenizer(file.header["pattern"], tables["class_starts"], tables["class_kinds"])
        added = file.header["added"]
        self._added: dict[str, int] = {token["content"]: token["id"] for token in added}
        self._special = frozenset(token["id"] for token in added if token["special"])
        longest_first = sorted(self._added, key=len, reverse=True)
        self._control = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
        self._cached_word = lru_cache(_CACHED_WORDS)(self._encode_word)

    @classmethod
    def open(cls, path: Path | str) -> "Tokenizer":
        """Open what `iotd convert` wrote. Raises PackageError where it is missing, damaged or of another version."""
        try:
            return cls(read_tokenizer_file(Path(path)))
        except (KeyError, TypeError) as error:
            raise PackageError(f"the tokenizer {path} is damaged: it has no {error}") from error

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id. The model's own table may have more rows, and ids may have gaps."""
        return len(self._offsets) - 1

    @property
    def byte_ids(self) -> Sequence[int]:
        """The tokens of the 256 bytes, of which every text can be made."""
        return self._byte_ids

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text. Control tokens in it are plain characters, unless `special` says they are meant."""
        return self.encode_parts([(text, special)])

    def encode_parts(self, parts: Iterable[tuple[str, bool]]) -> list[int]:
        """Token ids of (text, special) pairs read as one text.

        Control tokens are recognised inside special parts only; between them, neighbouring parts are joined first,
        so that the ids do not tell where one part ended and the next began.
        """
        ids: list[int] = []
        plain = ""
        for text, special in parts:
            pieces = self._control.split(text) if special else [text]
            plain += pieces[0]
            for control, following in zip(pieces[1::2], pieces[2::2], strict=True):
                ids += self._encode_plain(plain)
                ids.append(self._added[control])
                plain = following
        return ids + self._encode_plain(plain)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids that stand for just these bytes: nothing is normalised, and they may begin or end inside a character."""
        return self._encode_words(data.decode(errors="surrogateescape"))

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids. Bytes that are no UTF-8 become U+FFFD; ids without a token give nothing."""
        skipped = self._special if skip_special else frozenset[int]()
        return b"".join(self.token_bytes(token) for token in ids if token not in skipped).decode(errors="replace")

    def stream(self, skip_special: bool = True) -> "TextStream":
        """A decoder for ids that come one at a time."""
        return TextStream(self, self._special if skip_special else frozenset())

    def token_id(self, content: str) -> int | None:
        """Id of a control token such as `<|im_end|>`, or None where the tokenizer has no such one."""
        return self._added.get(content)

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; empty for an id without a token."""
        if not 0 <= token < self.vocab_size:
            return b""
        return bytes(self._bytes[self._offsets[token] : self._offsets[token + 1]])

    @property
    def control_ids(self) -> list[int]:
        """Of all control tokens, such as `<|im_end|>` and `<think>`."""
        return sorted(self._added.values())

    def _encode_plain(self, text: str) -> list[int]:
        return self._encode_words(self._normalizer.normalize(text))

    def _encode_words(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in self._pretokenizer.split(text):
            ids += self._cached_word(word) if len(word) <= _CACHED_LENGTH else self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        return self._merges.apply([self._byte_ids[byte] for byte in word.encode(errors="surrogateescape")])


class TextStream:
    """Decodes one id at a time into whole characters: pushed and flushed text together is what `decode` gives."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that became complete with this token; empty while a character is held back."""
        return "" if token in self._skipped else self._decoder.decode(self._tokenizer.token_bytes(token))

    def peek(self, tokens: Iterable[int]) -> str:
        """The text that pushing these tokens, and a flush, would give."""
        held, _ = self._decoder.getstate()
        data = b"".join(self._tokenizer.token_bytes(token) for token in tokens if token not in self._skipped)
        return (held + data).decode(errors="replace")

    def flush(self) -> str:
        """What was held back: U+FFFD for a character that never got complete, else nothing."""
        return self._decoder.decode(b"", final=True)
