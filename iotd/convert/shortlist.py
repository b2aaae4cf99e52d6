"""Which tokens an answer may be made of, where it need not be all of them: those of some texts, or of some languages.

Every text stays expressible, as the 256 bytes stay, with all control tokens. Knows no weights.
"""

import unicodedata
from collections.abc import Callable, Iterable, Sequence

from iotd.errors import InvalidInput
from iotd.model.tokenizer import Tokenizer

SCRIPTS: dict[str, tuple[str, ...]] = {
    "ar": ("ARABIC",),
    "bg": ("CYRILLIC",),
    "el": ("GREEK",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "ja": ("HIRAGANA", "KATAKANA", "CJK"),
    "ko": ("HANGUL",),
    "ru": ("CYRILLIC",),
    "th": ("THAI",),
    "uk": ("CYRILLIC",),
    "zh": ("CJK",),
}
"""How the Unicode names of their letters begin; Latin ones are always kept."""
LATIN = ("LATIN", "FEMININE ORDINAL", "MASCULINE ORDINAL", "MICRO")
_LATIN_CODES = "cs da de en es et fi fr hr hu id is it lt lv ms nl no pl pt ro sk sl sq sv tr vi"
LATIN_LANGUAGES = frozenset(_LATIN_CODES.split())
Choice = Callable[[Tokenizer], list[int]]
"""Of a checkpoint's tokenizer, the tokens that have a logit, ascending."""


def of_texts(tokenizer: Tokenizer, texts: Iterable[str]) -> list[int]:
    """Tokens that the texts are read as, ascending, and those that always stay."""
    found = set(_always(tokenizer))
    for text in texts:
        found.update(tokenizer.encode(text))
    return sorted(found)


def checked(languages: Sequence[str]) -> Sequence[str]:
    """ISO 639-1 codes. Raises InvalidInput for one that is not known."""
    known = LATIN_LANGUAGES | SCRIPTS.keys()
    for language in languages:
        if language not in known:
            raise InvalidInput(f"{language!r} is none of the languages known: {', '.join(sorted(known))}")
    return languages


def of_languages(tokenizer: Tokenizer, languages: Sequence[str]) -> list[int]:
    """Tokens without letters of other scripts than those of the languages, ascending, and those that always stay."""
    names = [name for language in languages for name in SCRIPTS.get(language, ())]
    written = _Written((*LATIN, *names))
    tokens = (token for token in range(tokenizer.vocab_size) if written.with_them(tokenizer.token_bytes(token)))
    return sorted({*_always(tokenizer), *tokens})


class _Written:
    """Tells what is written with some scripts."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._known: dict[str, bool] = {}

    def with_them(self, token: bytes) -> bool:
        """False for a part of a character, which only letters of other scripts are split into."""
        try:
            return bool(token) and all(map(self._fits, token.decode()))
        except UnicodeDecodeError:
            return False

    def _fits(self, char: str) -> bool:
        if char not in self._known:
            letter = unicodedata.category(char)[0] in "LM"
            self._known[char] = not letter or unicodedata.name(char, "").startswith(self._names)
        return self._known[char]


def _always(tokenizer: Tokenizer) -> Iterable[int]:
    """The bytes, which every text can be made of, and control tokens, which end it."""
    yield from tokenizer.byte_ids
    yield from tokenizer.control_ids
