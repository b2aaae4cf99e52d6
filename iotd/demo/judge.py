"""Judges an answer to a question about the home by its facts: the numbers, units, names and yes or no that it holds.

Knows no home: what has to be said is a `Fact`. Whoever asks says in which words; these judge how it is meant.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from iotd.demo.home import DOORS, HEATED_C
from iotd.demo.scene import KINDS


@dataclass(frozen=True, slots=True)
class Fact:
    """What an answer has to say. None or empty: nothing of that sort is asked."""

    numbers: frozenset[float] = frozenset()
    """One of these, and no other number."""
    words: tuple[frozenset[str], ...] = ()
    """Of the names in `among`, exactly one of these sets."""
    among: frozenset[str] = frozenset()
    yes: bool | None = None
    missing: bool = False
    """There is no reading."""


_ASKS_NAME = ("warmest", "coldest")
"""Kinds that ask for a name, whose number may be left out; where they ask for a number, its name may be."""
_ASKS_MORE = ("camera colour", "camera where")
"""Kinds to which a mere `No.` is no answer."""
_DEVICES = frozenset((*HEATED_C, *DOORS, *KINDS))
_SYNONYMS = {
    **dict.fromkeys(("centre", "center"), "middle"),
    **dict.fromkeys(("move", "moves", "moving"), "motion"),
    "doors": "door",
    "shut": "closed",
    "bike": "bicycle",
    "package": "parcel",
}
_NUMERALS = {"none": 0.0, "nothing": 0.0, "zero": 0.0, "one": 1.0, "two": 2.0, "three": 3.0, "four": 4.0, "five": 5.0}
_NO_THING = re.compile(r"\bno things?\b")
_NEGATIONS = frozenset(("no", "none", "nothing", "nobody", "nowhere", "not", "isn't", "aren't"))
_NONES = frozenset(("none", "nothing", "nobody", "nowhere", "empty"))
_CLAIMS = frozenset(("there", "see", "sees", "motion", "detected", "open"))
"""Words that say yes, unless they are negated."""
_TOPICS = _DEVICES | {"door", "motion"}
_UNKNOWN = re.compile(
    r"\bno (?:\w+ )?(?:readings?|data|sensor|information|idea)\b|\bunknown\b|\b(?:don't|do not) know\b"
)
_TIME = re.compile(r"\d+:\d\d(?::\d\d)?")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_UNIT = re.compile(r"°c|%|(?<=\d )w\b|(?<=\d)w\b")
_HEAD = re.compile(r"(yes|no|none|nothing|nobody|nowhere)\s*(?:[,.;:!]|$)")
_DENIED = frozenset(("not", "isn't", "aren't"))


def says(answer: str, fact: Fact, *, kind: str, question: str, expected: str) -> bool:
    """Whether a fact is in an answer in words, and no other of its sort. expected: the model answer, for its unit."""
    text = answer.casefold().replace("−", "-")
    words = _words(text)
    numbers = {float(number) for number in _NUMBER.findall(_TIME.sub("", text))}
    unknown = _UNKNOWN.search(text) is not None
    if fact.missing or unknown:
        return fact.missing and unknown and not numbers
    if fact.yes is not None:
        return _says_yes_or_no(text, words, fact, kind, _words(question.casefold()))
    if not set(_UNIT.findall(text)) <= ({"°c"} if kind in _ASKS_NAME else set(_UNIT.findall(expected.casefold()))):
        return False
    if not fact.among:
        counted = (
            numbers
            | {_NUMERALS[word] for word in words if word in _NUMERALS}
            | ({0.0} if _NO_THING.search(text) else set())
        )
        return len(counted) == 1 and counted <= fact.numbers
    return _names(words, numbers, fact, kind)


def same_json(answer: str, expected: str, fact: Fact) -> bool:
    """Whether both hold the same under the same keys. Lists are sets, and what the fact allows besides is right too."""
    try:
        found, wanted = json.loads(answer), json.loads(expected)
    except (ValueError, RecursionError):
        return False
    if not isinstance(found, dict):
        return False
    if wanted == {"value": None}:
        return len(found) == 1 and None in found.values()
    return found.keys() == wanted.keys() and all(_same(found[key], wanted[key], fact) for key in wanted)


def _same(found: object, wanted: object, fact: Fact) -> bool:
    if isinstance(found, bool) or isinstance(wanted, bool):
        return found is wanted
    if isinstance(found, list) and isinstance(wanted, list):
        return sorted(map(str, found)) == sorted(map(str, wanted))
    if isinstance(found, int | float) and isinstance(wanted, int | float) and wanted in fact.numbers:
        return found in fact.numbers
    if isinstance(found, str) and isinstance(wanted, str) and frozenset({wanted}) in fact.words:
        return frozenset({found}) in fact.words
    return found == wanted


def _names(words: Sequence[str], numbers: set[float], fact: Fact, kind: str) -> bool:
    named = fact.among.intersection(words)
    if not named and frozenset() in fact.words:
        return not _NONES.isdisjoint(words) or "no" in words[1:]
    if not _NEGATIONS.isdisjoint(words) or (fact.numbers and not numbers <= fact.numbers):
        return False
    if fact.numbers and kind not in _ASKS_NAME:
        return bool(numbers) and (not named or named in fact.words)
    return named in fact.words


def _says_yes_or_no(text: str, words: Sequence[str], fact: Fact, kind: str, asked: Sequence[str]) -> bool:
    if fact.among:
        fits = fact.among.intersection(words) in fact.words and not (kind in _ASKS_MORE and words == ["no"])
    else:
        fits = _DEVICES.intersection(words) <= set(asked)
    if _HEAD.match(text) is None:
        fits = fits and not _TOPICS.isdisjoint({*words} & {*asked})
    both_ways = {"yes", "no"} <= {*words} or {"open", "closed"} <= {*words}
    door = _door_state(asked) if kind == "state" else None
    return fits and not both_ways and _verdict(text, door, nones=bool(fact.among)) == fact.yes


def _verdict(text: str, door: bool | None, *, nones: bool) -> bool | None:
    """What an answer to a yes-or-no question comes to; None where it says neither, or contradicts itself.

    door: whether it was asked if one door is open (True) or closed (False). nones: `None.` and `Nothing.` are answers.
    """
    head = _HEAD.match(text)
    stated = _stated(_words(text[head.end() :] if head else text), door)
    if head is None:
        return stated
    if head[1] not in ("yes", "no") and not nones:
        return None
    verdict = head[1] == "yes"
    return verdict if stated in (None, verdict) else None


def _stated(words: Sequence[str], door: bool | None) -> bool | None:
    """What a statement says to the question; None where it says nothing to it."""
    if door is not None:
        state = _door_state(words)
        return None if state is None else state == door
    if words and words[0] in _NEGATIONS:
        return False
    return None if _CLAIMS.isdisjoint(words) else _NEGATIONS.isdisjoint(words)


def _door_state(words: Sequence[str]) -> bool | None:
    """Whether these words call a door open; None where they call it nothing, or both."""
    if ("open" in words) == ("closed" in words):
        return None
    return ("open" in words) == _DENIED.isdisjoint(words)


def _words(text: str) -> list[str]:
    found = re.findall(r"[^\W\d_]+(?:'\w+)?", text)
    return [_SYNONYMS.get(word, word) for word in found]
