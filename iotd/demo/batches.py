"""Conversations as tensors for training: token ids, positions, what each token's prediction is worth, and pictures.

Knows no network: numpy only. One seed gives one row, the same on every machine.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from iotd.config import DEFAULT_SYSTEM
from iotd.convert.chat import CHATML
from iotd.demo.examples import Asked, Heard, Pace, conversation
from iotd.demo.home import DOORS, HEATED_C
from iotd.demo.probes import Labels, labels
from iotd.demo.questions import APPLIANCES, Question, Told, extreme_of, side_of
from iotd.demo.scene import KINDS, Scene, draw
from iotd.engine.lines import day_line, day_of, frame_line, reading_line
from iotd.events import RGB
from iotd.model.chat import Segment, TemplateText, UserText
from iotd.model.tokenizer import Tokenizer

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

STREAM_WORTH = 0.1
"""Of a token of the stream, against 1 for one of an answer: readings repeat, so that predicting them is recall too."""


@dataclass(slots=True)
class Row:
    """One conversation of a fixed length."""

    ids: Ints
    """[T]."""
    positions: Ints
    """Rotary positions [3, T]: temporal, height, width."""
    worth: Floats
    """[T]: weight of the loss on this token being predicted."""
    answers: list[tuple[int, int, Question]]
    """Where each answer begins, and where it ends, with its end of turn."""
    scenes: list[Scene]
    """Its pictures, with what is in them."""
    lines: list[tuple[int, Labels]]
    """Last token of each line of the stream, and what the probes have to say there."""

    @property
    def pictures(self) -> list[RGB]:
        return [scene.rgb for scene in self.scenes]


class Writer:
    """Writes conversations as the daemon would have them read, with the answers in."""

    def __init__(self, tokenizer: Path, image_side: int) -> None:
        """image_side: tokens along one side of a picture."""
        self._tokenizer = Tokenizer.open(tokenizer)
        pad = self._tokenizer.token_id("<|image_pad|>")
        assert pad is not None
        self._pad = pad
        self._side = image_side

    def row(self, seed: int, length: int, pace: Pace, *, prompted: float = 1.0) -> Row:
        """The beginning of the conversation of that seed, `length` tokens of it.

        prompted: how likely it begins with the daemon's system prompt and the date, which say nothing new.
        """
        rng = random.Random(seed)
        draft = _Draft(self._pad, self._side)
        epoch_s = 86400.0 * rng.randrange(15000, 25000)
        if rng.random() < prompted:
            day = ""
            self._write(draft, CHATML.open_stream(DEFAULT_SYSTEM), 0.0)
        else:
            day = day_of(epoch_s)
            self._write(draft, [TemplateText(CHATML.user.before)], 0.0)
        asked, told = False, Told()
        events = conversation(seed, pace, epoch_s=epoch_s)
        while len(draft.ids) < length:
            event = next(events)
            if asked:
                self._write(draft, [TemplateText(CHATML.user.before)], 0.0)
            asked = isinstance(event, Asked)
            if isinstance(event, Asked):
                self._exchange(draft, event.question)
                continue
            if day != (today := day_of(event.time_s)):
                day = today
                self._write(draft, [UserText(day_line(day))], 0.0)
            if isinstance(event, Heard):
                self._write(draft, [UserText(reading_line(event.observation()))], STREAM_WORTH)
                told.hear(event.report)
                draft.line(labels(told))
                continue
            frame = event.observation()
            told.look(event.scene)
            before = UserText(frame_line(frame.camera, frame.time_s))
            self._write(draft, [before, *CHATML.image_segments(event.scene)], 0.0)
            self._write(draft, [UserText("\n")], 0.0)
            draft.line(labels(told))
        return draft.cut(length)

    def _exchange(self, draft: "_Draft", question: Question) -> None:
        """The question that closes the turn, and its answer."""
        self._write(draft, [UserText(question.text), *CHATML.close_turn(thinking=False)], 0.0)
        begin = len(draft.ids)
        end_of_turn = CHATML.assistant.after.rstrip("\n")
        self._write(draft, [UserText(question.answer), TemplateText(end_of_turn)], 1.0)
        draft.answers.append((begin, len(draft.ids), question))
        self._write(draft, [TemplateText(CHATML.assistant.after[len(end_of_turn) :])], 0.0)

    def drill(self, seed: int, length: int, sensors: int) -> Row:
        """A few sensors that say the same again and again, in any order, and what follows from them.

        Recall and comparison without words around them: only what can be known counts. sensors: at most so many.
        """
        rng = random.Random(seed)
        draft = _Draft(self._pad, self._side)
        surveys = rng.random() < 0.5
        labels = _SURVEYED if surveys else LABELS
        values = {label: drawn_value(label, rng) for label in rng.sample(labels, rng.randint(2, sensors))}
        near = rng.uniform(5, 25) if rng.random() < 0.5 else None
        said = Told()
        while len(draft.ids) < length:
            if surveys and len(said.values) > 1 and rng.random() < 0.4:
                label, value = rng.choice([*_surveys(said)])
                self._write(draft, [UserText(f" {label}")], 0.0)
                self._write(draft, [UserText(f" {value}\n")], 1.0)
                continue
            label = rng.choice([*values])
            if label in said.values and rng.random() < 0.2:
                values[label] = drawn_value(label, rng, near)
                del said.values[label]
            self._write(draft, [UserText(f" {label} ")], 0.0)
            self._write(draft, [UserText(f"{values[label]}\n")], 1.0 if label in said.values else 0.0)
            said.values[label] = values[label]
        return draft.cut(length)

    def captions(self, seed: int, length: int) -> Row:
        """Pictures with all that is in them, in a few words."""
        rng = np.random.default_rng(seed)
        draft = _Draft(self._pad, self._side)
        while len(draft.ids) < length:
            scene = drawn_scene(rng)
            self._write(draft, CHATML.image_segments(scene), 0.0)
            self._write(draft, [UserText(f"\n {len(scene.things)} things\n")], 1.0)
            for thing in sorted(scene.things, key=lambda thing: thing.kind):
                self._write(draft, [UserText(f" {thing.kind} {thing.colour} {side_of(thing, scene)}\n")], 1.0)
        return draft.cut(length)

    def _write(self, draft: "_Draft", segments: Sequence[Segment], worth: float) -> None:
        for run in CHATML.tokenize(segments, self._tokenizer):
            if isinstance(run, list):
                draft.text(run, worth)
            else:
                assert isinstance(run, Scene)
                draft.picture(run)


LABELS = (
    *(f"{room} {quantity}" for room in HEATED_C for quantity in ("temperature", "humidity", "motion")),
    *(f"{door} door" for door in DOORS),
    *(f"{appliance} power" for appliance in APPLIANCES),
)
_SURVEYED = tuple(label for label in LABELS if label.endswith(("temperature", "door", "motion")))


def drawn_scene(rng: np.random.Generator) -> Scene:
    """Any picture: up to all kinds of things, at any time of the day."""
    n = int(rng.choice([0, 1, 2, 3, 4, 5], p=[0.1, 0.3, 0.3, 0.2, 0.07, 0.03]))
    return draw([*rng.permutation(KINDS)[:n]], rng, light=float(rng.uniform(0.35, 1.0)))


def drawn_value(label: str, rng: random.Random, near: float | None = None) -> str:
    """What such a sensor may say. near: temperatures that are hard to tell apart."""
    match label.split()[-1]:
        case "temperature":
            return f"{rng.uniform(-5, 35) if near is None else rng.gauss(near, 1):.1f} °C"
        case "humidity":
            return f"{rng.randint(10, 99)} %"
        case "power":
            return f"{rng.randint(0, 2999)} W"
        case "motion":
            return rng.choice(("clear", "detected"))
        case _:
            return rng.choice(("open", "closed"))


def _surveys(said: Told) -> Iterator[tuple[str, str]]:
    """What follows from what was said, by its name."""
    for name, best in (("warmest", max), ("coldest", min)):
        if found := extreme_of(said, best):
            yield name, ", ".join(found)
    for quantity, state, ask, names in (("door", "open", "open", DOORS), ("motion", "detected", "moving", HEATED_C)):
        if states := said.sensors(quantity):
            yield ask, " and ".join(name for name in names if states.get(name) == state) or "nothing"


class _Draft:
    def __init__(self, pad: int, side: int) -> None:
        self.ids: list[int] = []
        self.answers: list[tuple[int, int, Question]] = []
        self._lines: list[tuple[int, Labels]] = []
        self._worth: list[float] = []
        self._positions: list[tuple[int, int, int]] = []
        self._scenes: list[tuple[int, Scene]] = []
        self._next = 0
        self._pad, self._side = pad, side

    def text(self, ids: list[int], worth: float) -> None:
        self.ids += ids
        self._worth += [worth] * len(ids)
        self._positions += [(at, at, at) for at in range(self._next, self._next + len(ids))]
        self._next += len(ids)

    def line(self, known: Labels) -> None:
        """A line of the stream has ended."""
        self._lines.append((len(self.ids) - 1, known))

    def picture(self, scene: Scene) -> None:
        at, side = self._next, self._side
        self._scenes.append((len(self.ids), scene))
        self.ids += [self._pad] * side**2
        self._worth += [0.0] * side**2
        self._positions += [(at, at + row, at + column) for row in range(side) for column in range(side)]
        self._next += side

    def cut(self, length: int) -> Row:
        """A picture that would be cut in two is left out: the row then ends with noughts that count for nothing."""
        whole = [scene for at, scene in self._scenes if at + self._side**2 <= length]
        ids, end = self.ids[:length], length
        if len(whole) < len(self._scenes) and (broken := self._scenes[len(whole)][0]) < length:
            ids[broken:] = [0] * (length - broken)
            end = broken
        return Row(
            np.array(ids, np.int64),
            np.array(self._positions[:length], np.int64).T,
            np.array(self._worth[:length], np.float32),
            [(begin, end, question) for begin, end, question in self.answers if end <= length],
            whole,
            [(at, known) for at, known in self._lines if at < end],
        )
