"""Answers of a given form: compiles a JSON schema, a regular expression or choices against a tokenizer.

Gives each answer a Constraint: which tokens may come next, which must, and how it can be ended at once. llguidance does
the parsing; the first format that comes imports it. Knows no model and no clock.
"""

import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from iotd.errors import InvalidInput
from iotd.events import Format
from iotd.model.closing import byte_tokenizer, find_closing
from iotd.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Ints = NDArray[np.intp]
MAX_BYTES = 16_384
"""Of a format's texts: what is known to be slowest compiles in 0.5 s then, on x86-64."""
MAX_CHOICES = 256
MAX_MULTIPLE = 10_000
"""Of all `multipleOf` together: numbers are read by an automaton of up to so many states."""
MAX_LEXER_STATES = 20_000
"""1 to 2 kB each, for each format that is kept."""
MAX_WORDS = 16
KEPT = 8
"""Formats that stay compiled, the last that were asked for."""


@dataclass(slots=True)
class Grammar:
    """A compiled format: matchers at the beginning of an answer, of tokens and of bytes, to be copied."""

    matcher: "LLMatcher"
    walk: "LLMatcher"
    words: list[bytes]
    """For `find_closing`."""
    closing: bytes
    """The shortest answer."""
    n_tokens: int
    """What an answer needs: the shortest, and of choices the longest."""
    worn: bool = False
    """An answer met a limit of llguidance: copies share the lexer, whose states become more with every answer."""


class Grammars:
    """Formats compiled for one model. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._eos = sorted(eos_token_ids)
        self._building = threading.Lock()
        self._trie: LLTokenizer | None = None
        self._keeping = threading.Lock()
        self._kept: OrderedDict[Format, Grammar] = OrderedDict()

    def constraint(self, format: Format, max_tokens: int) -> "Constraint":
        """For one answer of at most so many tokens.

        A format takes milliseconds when it is new, and the first one 1.2 s and 50 MB for a vocabulary of 248,000.
        Raises InvalidInput, naming the field, for one that does not compile or whose answers do not fit.
        """
        with self._keeping:
            grammar = self._kept.pop(format, None)
        if grammar is None or grammar.worn:
            grammar = self._compile(format)
        with self._keeping:
            self._kept[format] = grammar
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        if grammar.n_tokens > max_tokens:
            raise _invalid(format, f"an answer takes {grammar.n_tokens} tokens, and max_tokens is {max_tokens}")
        return Constraint(self._tokenizer, grammar)

    def _compile(self, format: Format) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        source = _source(format)
        walk = LLMatcher(byte_tokenizer(), source, log_level=0, limits=limits)
        if walk.is_error():
            raise _invalid(format, _reason(walk.get_error()))
        words = _words(format)
        closing = find_closing(walk, words=words)
        if closing is None:
            raise _invalid(format, "no answer was found: there is none, or only long ones, or the form is too complex")
        answers = map(str.encode, format.texts) if format.kind == "choices" else [closing]
        n_tokens = max(len(self._tokenizer.encode_bytes(answer)) for answer in answers)
        matcher = LLMatcher(self._vocabulary(), source, log_level=0, limits=limits)
        return Grammar(matcher, walk, words, closing, n_tokens)

    def _vocabulary(self) -> "LLTokenizer":
        """The trie of all tokens. llguidance's slices would make masks of free text faster, for 50 MB more."""
        from llguidance import LLTokenizer, TokenizerWrapper

        with self._building:
            if self._trie is None:
                wrapper = TokenizerWrapper(_Vocabulary(self._tokenizer, self._eos[0]))
                self._trie = LLTokenizer(wrapper, eos_token=self._eos, slices=[])
            return self._trie


class Constraint:
    """One answer's way through its format."""

    def __init__(self, tokenizer: Tokenizer, grammar: Grammar) -> None:
        self._tokenizer = tokenizer
        self._grammar = grammar
        self._matcher = grammar.matcher.deep_copy()
        self._walk = grammar.walk.deep_copy()
        self._closing = grammar.closing
        self._mask: NDArray[np.uint8] | None = None

    @property
    def may_end(self) -> bool:
        """It is valid as it stands."""
        return self._walk.is_accepting()

    @property
    def ended(self) -> bool:
        """It is valid, and nothing may follow."""
        return self.may_end and self._matcher.is_stopped()

    @property
    def closing(self) -> list[int]:
        """Tokens behind which it is valid: few, and not always the fewest."""
        return self._tokenizer.encode_bytes(self._closing)

    def allowed(self) -> Ints:
        """The tokens allowed next, ascending, an end of the turn included.

        None at all where llguidance gave up: the form is too complex for what was said so far.
        """
        return np.flatnonzero(np.unpackbits(self._bits(), bitorder="little"))

    def allowed_ids(self, limit: int) -> Ints | None:
        """The same where they are at most `limit`, else None, which takes no time."""
        return self.allowed() if np.bitwise_count(self._bits()).sum() <= limit else None

    def forced(self) -> list[int]:
        """The tokens that must come next, an end of the turn included; none where there is a choice."""
        if tokens := self._matcher.compute_ff_tokens():
            return tokens
        only = self.allowed_ids(1)
        return [] if only is None else only.tolist()

    def _bits(self) -> NDArray[np.uint8]:
        """One for each token."""
        if self._mask is None:
            mask = self._matcher.compute_bitmask()
            self._grammar.worn |= self._matcher.is_error()
            self._mask = np.frombuffer(b"" if self._matcher.is_error() else mask, np.uint8)
        return self._mask

    def take(self, tokens: Sequence[int], room: int) -> bool:
        """Go on by allowed tokens. False, and nothing changes, where `room` tokens more would not do to close."""
        data = b"".join(map(self._tokenizer.token_bytes, tokens))
        walk = self._walk.deep_copy()
        walk.consume_tokens(list(data))
        closing = find_closing(walk, self._closing.removeprefix(data), self._grammar.words)
        if closing is None or len(self._tokenizer.encode_bytes(closing)) > room:
            self._grammar.worn |= closing is None
            return False
        self._matcher.consume_tokens(list(tokens))
        self._walk, self._closing, self._mask = walk, closing, None
        return True


class _Vocabulary(Sequence[bytes]):
    """The tokens, and how the tokenizer cuts a text into them, as llguidance asks for it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos: int) -> None:
        self.eos_token_id = eos
        self.special_token_ids = tokenizer.control_ids
        self.tokens = self
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode_bytes(text)

    def __len__(self) -> int:
        return self._tokenizer.vocab_size

    def __getitem__(self, token: int) -> bytes:  # type: ignore[override] # nobody asks for slices
        if token >= len(self):
            raise IndexError
        return self._tokenizer.token_bytes(token)


def _source(format: Format) -> str:
    """The format in llguidance's own words. Raises InvalidInput."""
    from llguidance import LLMatcher

    nbytes = sum(len(text.encode()) for text in format.texts)
    if nbytes > MAX_BYTES:
        raise _invalid(format, f"{nbytes} bytes given, at most {MAX_BYTES} taken")
    if format.kind == "choices":
        _check_choices(format.texts)
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in format.texts))
    if format.kind == "regex":
        return LLMatcher.grammar_from_regex(format.texts[0])
    try:
        schema = json.loads(format.texts[0])
        _check_schema(schema)
        schema.pop("x-guidance", None)  # llguidance's own options
        return LLMatcher.grammar_from_json_schema(
            json.dumps(schema),
            overrides={
                # One line with the spaces that models put, so that all of it that the schema decides is forced.
                "whitespace_flexible": False,
                "item_separator": ", ",
                "key_separator": ": ",
                # Each text has one spelling, so that no property escapes its schema as "\\u0061" for "a".
                "json_allowed_escapes": '"\\bfnrt',
                # A keyword that cannot be kept to is an error.
                "lenient": False,
                "coerce_one_of": False,
            },
        )
    except (ValueError, RecursionError) as error:
        raise _invalid(format, str(error)) from error


def _check_choices(choices: Sequence[str]) -> None:
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise InvalidInput(f"choices: {len(choices)} given, 1 to {MAX_CHOICES} taken", field="choices")
    for index, choice in enumerate(choices):
        if not choice or choice in choices[:index]:
            what = "stands there twice" if choice else "is empty"
            raise InvalidInput(f"choices[{index}]: {choice!r} {what}", field=f"choices[{index}]")


def _check_schema(schema: Any) -> None:
    """What llguidance would take seconds for, or take and not keep to. Raises ValueError."""
    if not isinstance(schema, dict):
        raise ValueError("a schema is a JSON object")
    multiples = [value for value in _values_of("multipleOf", schema) if isinstance(value, int | float)]
    together = math.lcm(*(Fraction(str(value)).numerator for value in multiples if math.isfinite(value)))
    if together > MAX_MULTIPLE:
        raise ValueError(f"multipleOf: all of them together come to {together}, at most {MAX_MULTIPLE} is taken")
    if any(isinstance(value, int) and value > 1 for value in _values_of("minProperties", schema)):
        raise ValueError("minProperties: at most 1 is taken, as one property may be given twice")
    literals = [*_values_of("const", schema), *_values_of("enum", schema)]
    if re.search(r"\\u00|\x7f", json.dumps(literals, ensure_ascii=False)):
        raise ValueError("const, enum: control characters are not taken, but for \\b, \\f, \\n, \\r and \\t")


def _values_of(key: str, schema: Any) -> Iterator[Any]:
    if isinstance(schema, dict):
        yield from (value for name, value in schema.items() if name == key)
    if isinstance(schema, dict | list):
        for part in schema.values() if isinstance(schema, dict) else schema:
            yield from _values_of(key, part)


def _words(format: Format) -> list[bytes]:
    """What stands literally in regular expressions, as far as a look at them tells."""
    text = ""
    if format.kind == "regex":
        text = format.texts[0]
    elif format.kind == "json_schema":
        text = " ".join(map(str, _values_of("pattern", json.loads(format.texts[0]))))
    return [word.encode() for word in re.findall(r"\w{2,}", text)[:MAX_WORDS]]


def _reason(message: str) -> str:
    """llguidance's complaint in one line; of a regular expression, which it shows whole, only the point."""
    points = re.findall("^error: (.+)", message, re.MULTILINE)
    return "; ".join(points) or " ".join(message.removesuffix("<non-verbose/>").split())


def _invalid(format: Format, message: str) -> InvalidInput:
    return InvalidInput(f"{format.kind}: {message}", field=format.kind)
