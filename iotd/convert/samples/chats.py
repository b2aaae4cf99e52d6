"""The stream as the daemon feeds it: an open turn of lines, questions that close it, answers, the next turn."""

import random
from collections.abc import Iterator
from itertools import cycle, islice
from typing import TypeVar

from iotd.config import DEFAULT_SYSTEM
from iotd.convert.samples.blocks import Part, read_blocks
from iotd.convert.samples.homes import Home, Said, Stream, homes
from iotd.convert.samples.questions import Exchange, draw, phrases
from iotd.model.chat import ChatTemplate, Segment, TemplateText, Turn, UserText
from iotd.model.endings import ends_sentence
from iotd.model.tokenizer import Tokenizer

_Item = TypeVar("_Item")

PLAIN = ChatTemplate(
    no_system="",
    system=Turn("", "\n\n"),
    user=Turn("", "\n"),
    assistant=Turn("", "\n\n"),
    last_assistant=Turn("", "\n\n"),
    generation="",
    generation_thinking="",
    image=None,
)
"""For a model that has no chat template."""

_SYSTEMS = (DEFAULT_SYSTEM, DEFAULT_SYSTEM, "You are a helpful assistant.", "Answer in one short sentence.", "")
_TALK, _THINKS, _HINTED, _EXACT, _BLANK = 0.25, 0.4, 0.1, 0.15, 0.2
"""How often: a question about something else than sensors; thoughts before an answer; a word about its length; exact
figures before a question; a question about something else before all lines."""


class Writer:
    """Writes for one model and one part of the texts; `length` tokens a sequence."""

    def __init__(self, tokenizer: Tokenizer, chat: ChatTemplate | None, part: Part, length: int) -> None:
        self._tokenizer = tokenizer
        self._chat = chat or PLAIN
        self._length = length
        self._homes, self._phrases, self._talks = homes(part), phrases(part), talks(part)

    def sensor_lines(self, rng: random.Random, n_sequences: int) -> Iterator[list[int]]:
        """Sequences of lines alone, a home each."""
        for home in islice(_endless(self._homes, rng), n_sequences):
            stream = Stream(home, rng)
            ids = self.opening(DEFAULT_SYSTEM) + self._plain(stream.date())
            while len(ids) < self._length:
                ids += self._lines(stream)
            yield ids[: self._length]

    def conversations(self, rng: random.Random, n_sequences: int) -> Iterator[list[int]]:
        """Sequences of lines, questions and answers, a home each."""
        talks = _endless(self._talks, rng)
        for home in islice(_endless(self._homes, rng), n_sequences):
            stream = Stream(home, rng)
            ids = self.opening(rng.choice(_SYSTEMS))
            blank = rng.random() < _BLANK
            ids += self._exchange(next(talks), rng) if blank else self._plain(stream.date())
            while len(ids) < self._length:
                ids += self._round(stream, next(talks) if rng.random() < _TALK else None, rng)
            yield ids[: self._length]

    def opening(self, system: str) -> list[int]:
        """A system prompt, where it leaves most of a sequence free, and the beginning of the user's turn."""
        known = system if self._chat.system is not None else ""
        ids = self._written(self._chat.open_stream(known))
        return ids if len(ids) <= self._length // 3 else self._written(self._chat.open_stream())

    def _round(self, stream: Stream, talk: Exchange | None, rng: random.Random) -> list[int]:
        """Some lines, a question about them unless another is given, its answer, and the beginning of the next turn."""
        ids: list[int] = []
        for _ in range(rng.randint(0 if talk else 2, 7)):
            if len(ids) < self._length // 3:
                ids += self._lines(stream)
        exchange = talk or draw(stream.told, _language(stream.home, rng), self._phrases, rng)
        if exchange is None:
            return ids
        if talk is None and rng.random() < _EXACT:
            ids += self._exact(stream, rng)
        return ids + self._exchange(exchange, rng)

    def _exchange(self, exchange: Exchange, rng: random.Random) -> list[int]:
        thinks = bool(exchange.thoughts and self._chat.thought_end) and rng.random() < _THINKS
        asked = exchange.ask
        if rng.random() < _HINTED:
            asked += (" " if ends_sentence(asked) else "\n") + hint(max(2, len(exchange.answer.split()) + 1))
        thoughts: list[Segment] = []
        if thinks:
            thoughts = [UserText(exchange.thoughts), TemplateText(self._chat.thought_end)]
        return [
            *self._written([UserText(asked), *self._chat.close_turn(thinks)]),
            *self._written([*thoughts, UserText(exchange.answer)]),
            *self._written(self._chat.next_turn()),
        ]

    def _exact(self, stream: Stream, rng: random.Random) -> list[int]:
        label = rng.choice([*stream.told])
        return self._plain(exact_line(label, stream.told[label], rng))

    def _lines(self, stream: Stream) -> list[int]:
        return [token for line in stream.lines() for token in self._plain(line)]

    def _written(self, segments: list[Segment]) -> list[int]:
        runs = self._chat.tokenize(segments, self._tokenizer)
        return [token for run in runs for token in run]

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _endless(items: list[_Item], rng: random.Random) -> Iterator[_Item]:
    """All of them in a random order, again and again."""
    return cycle(rng.sample(items, len(items)))


def _language(home: Home, rng: random.Random) -> str:
    return home.language if rng.random() < 0.7 else "en"


def talks(part: Part) -> list[Exchange]:
    """Questions that have nothing to do with sensors: `Q: ` begins one, `T: ` its thoughts, `A: ` its answer."""
    return [_talk(body) for _, body in read_blocks(part, "talks")]


def _talk(body: str) -> Exchange:
    asked, _, answer = body.removeprefix("Q: ").partition("\nA: ")
    ask, _, thoughts = asked.partition("\nT: ")
    return Exchange(ask, answer, thoughts)


def hint(words: int) -> str:
    """How long an answer may be, as the daemon says it."""
    return f"Answer in at most {words} words."


def exact_line(label: str, said: Said, rng: random.Random) -> str:
    """A sensor's figures of a day, as the daemon writes them before a question."""
    line = f"exact {label}: {said.text} [{said.clock}]"
    if said.number is None:
        return f"{line}\n"
    spread = abs(said.number) * rng.uniform(0.02, 0.4)
    lowest, highest = (round(said.number + sign * spread * rng.random(), said.decimals) for sign in (-1, 1))
    mean = (lowest + highest) / 2
    line += f"; in 24 hours {lowest:g} to {highest:g}{said.unit}, on average {mean:.3g}{said.unit}"
    if rng.random() < 0.7:
        line += f"; {rng.gauss(0, spread / 5):+.2g}{said.unit} in an hour"
    return f"{line}\n"
