"""Questions about the simulated home whose answers can be checked: drawn, phrased, answered from what was told, judged.

An answer follows from what the devices said, since that is all a model can know, and is judged by its facts: the
numbers, names and yes or no that it holds, and not by its words.
"""

import json
import random
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from iotd.demo.devices import Report
from iotd.demo.home import DOORS, HEATED_C
from iotd.demo.judge import Fact, same_json, says
from iotd.demo.scene import COLOURS, KINDS, Scene, Thing
from iotd.engine.lines import hint

NO_READING = "I have no reading for that."
TIE_C = 0.1
"""Rooms whose temperatures differ by no more are both the warmest: sensors are no better."""
SIDES = ("left", "middle", "right")
_SIDE_EDGES, _SIDE_SLACK = (0.36, 0.64), 0.06
"""Of the picture's width; within the slack of an edge both sides are right."""
HELD_OUT_EVERY = 5
"""One phrasing in so many is kept from training."""
_QUANTITY_UNIT = {"temperature": "°C", "humidity": "%", "power": "W"}
APPLIANCES = ("fridge", "kettle", "washer")
HINTED_WORDS = 2, 14
"""What the daemon may tell a model that is short of time."""

KIND_WEIGHTS = {
    "value": 8.0,
    "state": 4.0,
    "any door": 2.0,
    "any motion": 1.5,
    "warmest": 2.5,
    "coldest": 2.5,
    "missing": 2.5,
    "camera what": 2.0,
    "camera whether": 1.5,
    "camera how many": 1.5,
    "camera colour": 1.5,
    "camera where": 1.5,
}
"""The kinds of questions of the demo, and how often each is drawn."""
FORMS = ("brief", "sentence", "long", "json")
"""Of answers. Where there is nothing to say at length, `long` is a sentence."""


@dataclass(slots=True)
class Told:
    """What the devices have said up to now: all that an answer may rest on."""

    values: dict[str, str] = field(default_factory=dict)
    """The newest value of each sensor by its label, such as `kitchen temperature`: `21.4 °C`."""
    scene: Scene | None = None
    """The newest picture."""
    spoilt: set[str] = field(default_factory=set)
    """Labels under which something else than a value was said last."""

    def hear(self, report: Report) -> None:
        self.values.update(report.says)
        self.spoilt -= report.says.keys()
        if not report.says:
            _, name, quantity = report.topic.split("/")
            self.spoilt.add(f"{name} {quantity}")

    def look(self, scene: Scene) -> None:
        self.scene = scene

    def copy(self) -> "Told":
        return Told(dict(self.values), self.scene, set(self.spoilt))

    def sensors(self, quantity: str) -> dict[str, str]:
        """Newest values of one quantity by room, door or appliance."""
        return {
            label.rpartition(" ")[0]: value
            for label, value in self.values.items()
            if label.endswith(f" {quantity}") and label not in self.spoilt
        }


@dataclass(frozen=True, slots=True)
class Question:
    """One question with the answer that a careful person gives, and what has to be in any right one."""

    kind: str
    text: str
    answer: str
    fact: Fact
    form: str
    """One of FORMS."""
    max_words: int | None = None
    """Where the question names a limit."""

    @property
    def yes_or_no(self) -> bool:
        """Whether its answer begins with one of these words."""
        return self.fact.yes is not None and re.match(r"(Yes|No)\b", self.answer) is not None

    def right(self, answer: str) -> bool:
        """Whether an answer says what is so, in the form and length asked for."""
        answer = answer.strip()
        if self.max_words is not None and len(answer.split()) > self.max_words:
            return False
        if self.form == "json":
            return same_json(answer, self.answer, self.fact)
        if self.form == "long":  # its second sentence is free
            answer = re.split(r"(?<=[.!])\s", answer)[0]
        return says(answer, self.fact, kind=self.kind, question=self.text, expected=self.answer)


def draw_question(
    told: Told,
    rng: random.Random,
    *,
    held_out: bool = False,
    weights: Mapping[str, float] = KIND_WEIGHTS,
    forms: Collection[str] = FORMS,
    hurried: float = 0.0,
) -> Question:
    """A question of a random kind about what was told, for an answer in one of these forms.

    held_out: in one of the phrasings that training never uses. hurried: how likely the daemon adds how long the answer
    may be, whatever the question says of that.
    """
    kinds, odds = [*weights], [*weights.values()]
    while True:
        kind = rng.choices(kinds, odds)[0]
        subject = _SUBJECTS[kind](told, rng)
        if subject is not None:
            question = _phrased(kind, subject, rng, held_out, forms)
            return _hurried(question, subject, rng) if hurried and rng.random() < hurried else question


@dataclass(frozen=True, slots=True)
class _Subject:
    """One thing to ask, in every form of its answer."""

    cores: tuple[str, ...]
    """Ways to ask, without what comes before and behind."""
    fact: Fact
    brief: str
    sentence: str
    json: object
    more: str = ""
    """A second sentence for the long answer."""


_Draw = Callable[[Told, random.Random], _Subject | None]
"""Chooses what to ask; None where there is nothing of that kind."""

_BEFORE = ("", "", "", "Please tell me: ", "Tell me, ", "Hey, ", "Quick question: ", "I want to know: ")
_BRIEF = ("Answer in at most {n} words.", "At most {n} words.", "Use no more than {n} words.", "Be brief.", "In short.")
_SENTENCE = ("", "", "", "Answer in at most {n} words.", "Answer in one sentence.", "At most {n} words.")
_LONG = ("Answer in at most {n} words.", "At most {n} words, please.", "Use up to {n} words.", "Answer at length.")
_JSON = ("Answer as JSON.", "As JSON, please.", "Reply in JSON.", "JSON only.")
_FORMS: dict[str, tuple[tuple[str, ...], float]] = {
    "brief": (_BRIEF, 3.0),
    "sentence": (_SENTENCE, 5.0),
    "long": (_LONG, 0.7),
    "json": (_JSON, 1.3),
}


def _phrased(
    kind: str, subject: _Subject, rng: random.Random, held_out: bool, among: Collection[str] = FORMS
) -> Question:
    forms = [form for form in FORMS if form in among and (form != "long" or subject.more)] or ["sentence"]
    while True:
        form = rng.choices(forms, [_FORMS[name][1] for name in forms])[0]
        before, core, behind = rng.choice(_BEFORE), rng.choice(subject.cores), rng.choice(_FORMS[form][0])
        shape = f"{before}|{kind}{subject.cores.index(core)}|{behind}"
        if not before and not behind:
            # The plainest way to ask is everybody's: nothing to hold out.
            break
        if (zlib.crc32(shape.encode()) % HELD_OUT_EVERY == 0) == held_out:
            break
    answer = {
        "brief": subject.brief,
        "sentence": subject.sentence,
        "long": f"{subject.sentence} {subject.more}",
        "json": json.dumps(subject.json, ensure_ascii=False),
    }[form]
    n_words = len(answer.split())
    limit = {
        "brief": max(n_words, rng.randint(2, 4)),
        "sentence": max(n_words, rng.randint(10, 16)),
        "long": rng.randint(30, 40),
    }
    max_words = limit[form] if "{n}" in behind else None
    text = before + (core[0].lower() + core[1:] if before.endswith((", ", ": ")) else core)
    text = f"{text} {behind.format(n=max_words)}".strip()
    return Question(kind, text, answer, subject.fact, form, max_words)


def _hurried(question: Question, subject: _Subject, rng: random.Random) -> Question:
    """With the daemon's own word about the answer's length behind it, which counts for more than the question's."""
    n_words = rng.randint(*HINTED_WORDS)
    answers = {question.form: question.answer, "sentence": subject.sentence}
    fits = [form for form, answer in answers.items() if len(answer.split()) <= n_words]
    form, answer = (fits[0], answers[fits[0]]) if fits else ("brief", subject.brief)
    return replace(question, text=f"{question.text} {hint(n_words)}", answer=answer, form=form, max_words=None)


def _value(told: Told, rng: random.Random) -> _Subject | None:
    known = [(name, quantity, value) for quantity in _QUANTITY_UNIT for name, value in told.sensors(quantity).items()]
    if not known:
        return None
    name, quantity, value = rng.choice(known)
    number, unit = value.split()
    sentence = f"The {name} {quantity} is {value}."
    warmest = extreme_of(told, max)
    more = f"The warmest room is the {warmest[0]}, at {warmest[1]}." if warmest else ""
    numbers = frozenset({float(number)})
    fact = Fact(numbers=numbers, words=(frozenset({name}),), among=_NAMES)
    return _Subject(
        _value_cores(name, quantity), fact, value, sentence, {"value": json.loads(number), "unit": unit}, more
    )


def _value_cores(name: str, quantity: str) -> tuple[str, ...]:
    the = f"the {name}"
    match quantity:
        case "temperature":
            return (
                f"What is the temperature in {the}?",
                f"How warm is it in {the}?",
                f"What is the {name} temperature?",
                f"How many degrees are there in {the}?",
            )
        case "humidity":
            return (
                f"What is the humidity in {the}?",
                f"How humid is it in {the}?",
                f"What is the {name} humidity?",
                f"How damp is {the}?",
            )
        case _:
            return (
                f"How much power does {the} draw?",
                f"What does {the} draw?",
                f"What is the {name} power?",
                f"How many watts does {the} use?",
            )


def _state(told: Told, rng: random.Random) -> _Subject | None:
    doors, motion = told.sensors("door"), told.sensors("motion")
    if not doors and not motion:
        return None
    if rng.random() * (len(doors) + len(motion)) < len(doors):
        name = rng.choice([*doors])
        is_open = doors[name] == "open"
        asks_closed = rng.random() < 0.3
        yes = is_open != asks_closed
        cores: tuple[str, ...] = (
            (f"Is the {name} door closed?", f"Is the {name} door shut?")
            if asks_closed
            else (
                f"Is the {name} door open?",
                f"Does the {name} door stand open?",
                f"Has the {name} door been left open?",
            )
        )
        sentence = f"{_yes(yes)}, the {name} door is {doors[name]}."
    else:
        name = rng.choice([*motion])
        yes = motion[name] == "detected"
        cores = (
            f"Is there motion in the {name}?",
            f"Is anything moving in the {name}?",
            f"Does anybody move in the {name}?",
        )
        sentence = f"{_yes(yes)}, there is {'' if yes else 'no '}motion in the {name}."
    return _Subject(cores, Fact(yes=yes), _yes(yes) + ".", sentence, {"answer": yes})


def _any_door(told: Told, rng: random.Random) -> _Subject | None:
    doors = told.sensors("door")
    if not doors:
        return None
    names = [door for door in DOORS if doors.get(door) == "open"]
    if not names and len(doors) < len(DOORS):
        return None  # the others may be open
    cores = ("Is any door open?", "Are there open doors?", "Does any door stand open?", "Is a door open somewhere?")
    sentence = (
        f"Yes, {_joined([f'the {name} door' for name in names])} {_are(names)} open."
        if names
        else "No, no door is open."
    )
    fact = Fact(yes=bool(names), words=(frozenset(names), frozenset()), among=frozenset(DOORS))
    return _Subject(cores, fact, _yes(bool(names)) + ".", sentence, {"open": names})


def _any_motion(told: Told, rng: random.Random) -> _Subject | None:
    motion = told.sensors("motion")
    if not motion:
        return None
    names = [room for room in HEATED_C if motion.get(room) == "detected"]
    if not names and not motion.keys() >= told.sensors("temperature").keys():
        return None
    cores = (
        "Is anything moving in the house?",
        "Is there motion anywhere?",
        "Is anybody moving about?",
        "Does anything move?",
    )
    sentence = (
        f"Yes, there is motion in {_joined([f'the {name}' for name in names])}." if names else "No, there is no motion."
    )
    fact = Fact(yes=bool(names), words=(frozenset(names), frozenset()), among=frozenset(HEATED_C))
    return _Subject(cores, fact, _yes(bool(names)) + ".", sentence, {"motion": names})


def extreme_of(told: Told, best: Callable[..., str]) -> tuple[str, str] | None:
    """The room that `best` (min or max) takes for its temperature, and that; None where fewer than two are known."""
    rooms = told.sensors("temperature")
    if len(rooms) < 2:
        return None
    name = best(rooms, key=lambda room: float(rooms[room].split()[0]))
    return name, rooms[name]


def _extreme(kind: str) -> _Draw:
    best = max if kind == "warmest" else min
    same = "hottest" if kind == "warmest" else "coolest"

    def subject(told: Told, rng: random.Random) -> _Subject | None:
        found = extreme_of(told, best)
        if found is None:
            return None
        name, value = found
        number = json.loads(value.split()[0])
        rooms = {room: float(text.split()[0]) for room, text in told.sensors("temperature").items()}
        ties = {room: c for room, c in rooms.items() if abs(c - number) <= TIE_C + 1e-6}
        cores = (
            f"Which room is the {kind}?",
            f"Which room is the {same}?",
            f"What is the {kind} room?",
            f"Where is it {kind}?",
            f"Which is the {same} room in the house?",
        )
        fact = Fact(
            numbers=frozenset(ties.values()), words=tuple(frozenset({room}) for room in ties), among=frozenset(HEATED_C)
        )
        sentence = f"The {name} is the {kind} room, at {value}."
        return _Subject(cores, fact, f"The {name}.", sentence, {"room": name, "temperature": number})

    return subject


def _missing(told: Told, rng: random.Random) -> _Subject | None:
    asked = [(name, quantity) for name in HEATED_C for quantity in ("temperature", "temperature", "humidity")]
    asked += [(name, "power") for name in (*APPLIANCES, "oven", "dryer")]
    absent = [(n, q) for n, q in asked if f"{n} {q}" not in told.values and f"{n} {q}" not in told.spoilt]
    rooms = [name for name in HEATED_C if f"{name} motion" not in told.values and f"{name} motion" not in told.spoilt]
    doors = [name for name in (*DOORS, "cellar", "side") if f"{name} door" not in told.values]
    pick = rng.random()
    if pick < 0.2 and rooms:
        cores: tuple[str, ...] = (
            f"Is there motion in the {(name := rng.choice(rooms))}?",
            f"Is anything moving in the {name}?",
        )
    elif pick < 0.35 and doors:
        cores = (f"Is the {(name := rng.choice(doors))} door open?", f"Is the {name} door closed?")
    elif pick < 0.4 and told.scene is None:
        cores = ("What does the camera see?", "How many things does the camera see?")
    else:
        name, quantity = rng.choice(absent)
        cores = _value_cores(name, quantity)
    return _Subject(cores, Fact(missing=True), "No reading.", NO_READING, {"value": None})


def _camera(about: Callable[[Scene, random.Random], _Subject | None]) -> _Draw:
    return lambda told, rng: about(told.scene, rng) if told.scene is not None else None


def _what(scene: Scene, rng: random.Random) -> _Subject:
    things = _kinds(scene)
    cores = (
        "What does the camera see?",
        "What does the camera at the door show?",
        "What is at the door?",
        "What can you see at the door?",
        "Describe the picture.",
    )
    listed = _joined([f"a {thing}" for thing in things]) or "nothing"
    fact = Fact(words=(frozenset(things),), among=frozenset(KINDS))
    return _Subject(cores, fact, ", ".join(things).capitalize() or "Nothing", f"I see {listed}.", {"things": things})


def _whether(scene: Scene, rng: random.Random) -> _Subject:
    kind = rng.choice(KINDS)
    yes = kind in _kinds(scene)
    cores = (
        f"Is there a {kind} at the door?",
        f"Does the camera see a {kind}?",
        f"Can you see a {kind}?",
        f"Is a {kind} in the picture?",
    )
    return _Subject(
        cores, Fact(yes=yes), _yes(yes) + ".", f"{_yes(yes)}, I see {'a' if yes else 'no'} {kind}.", {"answer": yes}
    )


def _how_many(scene: Scene, rng: random.Random) -> _Subject:
    count = len(scene.things)
    cores = (
        "How many things does the camera see?",
        "How many things are at the door?",
        "How many things are in the picture?",
        "Count the things at the door.",
    )
    fact = Fact(numbers=frozenset({float(count)}))
    return _Subject(cores, fact, str(count), f"I see {count} thing{'' if count == 1 else 's'}.", {"count": count})


def _about_thing(
    asks: Sequence[str], answered: Callable[[Thing, Scene, tuple[str, ...]], _Subject]
) -> Callable[[Scene, random.Random], _Subject | None]:
    """Questions about one thing, or about one that is not there."""

    def subject(scene: Scene, rng: random.Random) -> _Subject | None:
        kind = _subject_of(scene, rng)
        if kind is None:
            return None
        cores = tuple(ask.format(kind=kind) for ask in asks)
        thing = next((thing for thing in scene.things if thing.kind == kind), None)
        return _absent(kind, cores) if thing is None else answered(thing, scene, cores)

    return subject


def _colour(thing: Thing, scene: Scene, cores: tuple[str, ...]) -> _Subject:
    fact = Fact(words=(frozenset({thing.colour}),), among=frozenset(COLOURS))
    sentence = f"The {thing.kind} is {thing.colour}."
    return _Subject(cores, fact, thing.colour.capitalize() + ".", sentence, {"colour": thing.colour})


def _where(thing: Thing, scene: Scene, cores: tuple[str, ...]) -> _Subject:
    centre = _centre(thing, scene)
    side = _side(centre)
    also = {_side(centre + _SIDE_SLACK), _side(centre - _SIDE_SLACK), side}
    placed = "in the middle" if side == "middle" else f"on the {side}"
    fact = Fact(words=tuple(frozenset({name}) for name in also), among=frozenset(SIDES))
    return _Subject(cores, fact, placed.capitalize() + ".", f"The {thing.kind} is {placed}.", {"side": side})


_COLOUR_ASKS = (
    "What colour is the {kind}?",
    "Which colour has the {kind}?",
    "What is the colour of the {kind}?",
    "What colour is the {kind} at the door?",
)
_WHERE_ASKS = (
    "Where is the {kind}?",
    "On which side is the {kind}?",
    "Where in the picture is the {kind}?",
    "Where do you see the {kind}?",
)


def _subject_of(scene: Scene, rng: random.Random) -> str | None:
    """Mostly what is there, now and then what is not; None where there is nothing to ask about."""
    there = _kinds(scene)
    absent = [kind for kind in KINDS if kind not in there]
    if absent and rng.random() < 0.15:
        return rng.choice(absent)
    return rng.choice(there) if there else None


def _absent(kind: str, cores: tuple[str, ...]) -> _Subject:
    return _Subject(
        cores,
        Fact(yes=False, words=(frozenset({kind}), frozenset()), among=frozenset((*KINDS, *COLOURS, *SIDES))),
        "None.",
        f"I see no {kind}.",
        {"value": None},
    )


def side_of(thing: Thing, scene: Scene) -> str:
    """One of SIDES."""
    return _side(_centre(thing, scene))


def _centre(thing: Thing, scene: Scene) -> float:
    width: int = scene.rgb.shape[1]
    return (thing.box[0] + thing.box[2]) / 2 / width


def _side(x: float) -> str:
    return SIDES[sum(x > edge for edge in _SIDE_EDGES)]


def _kinds(scene: Scene) -> list[str]:
    return sorted(thing.kind for thing in scene.things)


_SUBJECTS: dict[str, _Draw] = {
    "value": _value,
    "state": _state,
    "any door": _any_door,
    "any motion": _any_motion,
    "warmest": _extreme("warmest"),
    "coldest": _extreme("coldest"),
    "missing": _missing,
    "camera what": _camera(_what),
    "camera whether": _camera(_whether),
    "camera how many": _camera(_how_many),
    "camera colour": _camera(_about_thing(_COLOUR_ASKS, _colour)),
    "camera where": _camera(_about_thing(_WHERE_ASKS, _where)),
}
_NAMES = frozenset((*HEATED_C, *APPLIANCES))


def _yes(yes: bool) -> str:
    return "Yes" if yes else "No"


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _joined(names: Iterable[str]) -> str:
    *most, last = [*names] or [""]
    return f"{', '.join(most)} and {last}" if most else last
