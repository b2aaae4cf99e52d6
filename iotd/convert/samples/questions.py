"""Questions about what a home's sensors have said, with answers that follow from it."""

import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from iotd.convert.samples.blocks import Part, read_blocks
from iotd.convert.samples.homes import Said

Told = Mapping[str, Said]
Fill = dict[str, object]

_ANSWERED, _THOUGHT = " => ", " ~~ "
_TRIES = 20
_YES_NO = {
    "en": ("Yes", "No"),
    "de": ("Ja", "Nein"),
    "fr": ("Oui", "Non"),
    "es": ("Sí", "No"),
    "it": ("Sì", "No"),
    "nl": ("Ja", "Nee"),
    "pt": ("Sim", "Não"),
    "pl": ("Tak", "Nie"),
    "ru": ("Да", "Нет"),
    "zh": ("是", "否"),
    "ja": ("はい", "いいえ"),
}


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question, and what a careful person answers."""

    ask: str
    answer: str
    thoughts: str = ""
    """What comes before the answer where the model thinks; may be empty."""


@dataclass(frozen=True, slots=True)
class Phrase:
    """A way to ask, with slots such as `{label}`."""

    kind: str
    language: str
    exchange: Exchange

    def filled(self, fill: Fill) -> Exchange:
        ask, answer, thoughts = self.exchange.ask, self.exchange.answer, self.exchange.thoughts
        return Exchange(ask.format(**fill), answer.format(**fill), thoughts.format(**fill))


def phrases(part: Part) -> list[Phrase]:
    """All ways to ask about sensors."""
    return [
        Phrase(kind, language, _exchange(line))
        for (kind, language), body in read_blocks(part, "phrases")
        for line in body.splitlines()
    ]


def _exchange(line: str) -> Exchange:
    ask, _, rest = line.partition(_ANSWERED)
    thoughts, _, answer = rest.rpartition(_THOUGHT)
    return Exchange(ask, answer, thoughts)


def draw(told: Told, language: str, known: list[Phrase], rng: random.Random) -> Exchange | None:
    """A question about what was told, in that language; None where no kind of question has an answer."""
    spoken = [phrase for phrase in known if phrase.language == language]
    for _ in range(_TRIES):
        phrase = rng.choice(spoken)
        fill = KINDS[phrase.kind](told, language, rng)
        if fill is not None:
            return phrase.filled(fill)
    return None


def _any(told: Told, language: str, rng: random.Random) -> Fill | None:
    label = rng.choice([*told])
    said = told[label]
    return {"label": label, "value": said.text, "clock": said.clock, "json": _json({"sensor": label, "is": said.text})}


def _number(told: Told, language: str, rng: random.Random) -> Fill | None:
    label = _drawn((label for label, said in told.items() if said.number is not None), rng)
    if label is None:
        return None
    said = told[label]
    number = said.number
    assert number is not None
    limit = round(number * rng.choice((0.5, 0.9, 1.1, 2.0)) + rng.choice((-1, 1)), said.decimals)
    facts = {"value": number if said.decimals else int(number), "unit": said.unit.strip(), "time": said.clock}
    return {
        "label": label,
        "value": said.text,
        "clock": said.clock,
        "number": f"{number:.{said.decimals}f}",
        "limit": f"{limit:.{said.decimals}f}{said.unit}",
        "truth": _truth(number > limit, language),
        "relation": "more than" if number > limit else "not more than",
        "json": _json(facts),
        "flag": _json({"above": number > limit}),
    }


def _state(told: Told, language: str, rng: random.Random) -> Fill | None:
    label = _drawn((label for label, said in told.items() if said.states), rng)
    if label is None:
        return None
    said = told[label]
    state = rng.choice(said.states)
    truth = said.text == state
    fill: Fill = {"label": label, "value": said.text, "clock": said.clock, "state": state}
    return {**fill, "truth": _truth(truth, language), "flag": _json({label: truth})}


def _list(told: Told, language: str, rng: random.Random) -> Fill | None:
    label = _drawn((label for label, said in told.items() if said.states), rng)
    if label is None:
        return None
    state = told[label].text
    labels = [label for label, said in told.items() if said.text == state]
    return {"state": state, "labels": ", ".join(labels), "n": len(labels), "json": _json(labels)}


def _pair(told: Told, language: str, rng: random.Random) -> Fill | None:
    """Two sensors of one unit, the one with more first."""
    numbers = {label: said.number for label, said in told.items() if said.number is not None and said.unit}
    pairs = [(a, b) for a in numbers for b in numbers if numbers[a] > numbers[b] and told[a].unit == told[b].unit]
    if not pairs:
        return None
    more, less = rng.choice(pairs)
    difference = f"{numbers[more] - numbers[less]:.{told[more].decimals}f}{told[more].unit}"
    asked = rng.choice(((more, less), (less, more)))
    fill: Fill = {"a": asked[0], "b": asked[1], "more": more, "less": less, "difference": difference}
    return {**fill, "a_value": told[asked[0]].text, "b_value": told[asked[1]].text, "value": told[more].text}


def _change(told: Told, language: str, rng: random.Random) -> Fill | None:
    label = _drawn((label for label, said in told.items() if said.before and said.before != said.text), rng)
    if label is None:
        return None
    return {"label": label, "value": told[label].text, "before": told[label].before, "clock": told[label].clock}


def _several(told: Told, language: str, rng: random.Random) -> Fill | None:
    if len(told) < 2:
        return None
    labels = rng.sample([*told], rng.randint(2, min(4, len(told))))
    values = {label: told[label].text for label in labels}
    listed = "\n".join(f"- {label}: {text}" for label, text in values.items())
    table = "\n".join(["| sensor | value |", "|---|---|", *(f"| {label} | {text} |" for label, text in values.items())])
    return {"labels": ", ".join(labels), "list": listed, "table": table, "json": _json(values), "last": [*told][-1]}


def _missing(told: Told, language: str, rng: random.Random) -> Fill | None:
    known = {label.split()[0] for label in told}
    place = _drawn((place for place in ("attic", "pantry", "balcony", "chapel", "veranda") if place not in known), rng)
    return {"absent": f"{place} {rng.choice(('humidity', 'temperature', 'door', 'power'))}", "null": "null"}


KINDS: Mapping[str, Callable[[Told, str, random.Random], Fill | None]] = {
    "any": _any,
    "number": _number,
    "state": _state,
    "list": _list,
    "pair": _pair,
    "change": _change,
    "several": _several,
    "missing": _missing,
}
"""What fills the slots of each kind of phrase; None where nothing told so far does."""


def _drawn(labels: Iterable[str], rng: random.Random) -> str | None:
    found = [*labels]
    return rng.choice(found) if found else None


def _truth(truth: bool, language: str) -> str:
    return _YES_NO[language][0 if truth else 1]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
