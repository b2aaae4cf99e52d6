"""What the yardstick measures on: texts by kind, none of which calibration has seen. Knows no model."""

import pydoc_data.topics
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from iotd.demo.examples import HELD_OUT_SEED, Asked, Heard, Pace, conversation
from iotd.engine.lines import day_line, day_of, reading_line

Ints = NDArray[np.int64]
CHAT = Path(__file__).parent.parent / "data" / "yardstick_chat.txt"
LENGTH = 512
LEAST = 64
"""Tokens that the rest of a text must have to count."""
CHARACTERS = 150_000
"""Of a kind of text that has no end of its own: more than anybody measures on."""
PACE = Pace(events=(4, 18), questions=(1, 3), frames=0.0, mischief=0.0)


@dataclass(frozen=True, slots=True)
class Text:
    kind: str
    text: str


def read_texts(path: Path) -> list[Text]:
    """Of a file the part behind each line `## KIND`. Raises ValueError where there is none."""
    found = re.split(r"^## +(\S.*?)\s*$\n?", path.read_text("utf-8"), flags=re.MULTILINE)
    texts = [Text(kind, text.strip()) for kind, text in zip(found[1::2], found[2::2], strict=True)]
    if not texts or not all(text.text for text in texts):
        raise ValueError(f"{path}: a line `## KIND` must stand before each text")
    return texts


def default_texts() -> list[Text]:
    """Prose: Python's own reference. Sensor: simulated homes that nothing is trained on. Chat: a file of the tests."""
    return [Text("prose", _prose()), Text("sensor", _sensors()), Text("chat", CHAT.read_text("utf-8"))]


def cut(ids: Sequence[int], first: Sequence[int]) -> list[Ints]:
    """The tokens of a text as sequences of LENGTH, each behind what sequences begin with."""
    step = LENGTH - len(first)
    parts = [ids[start : start + step] for start in range(0, len(ids), step)]
    return [np.array([*first, *part], np.int64) for part in parts if len(part) >= min(LEAST, len(ids))]


def _prose() -> str:
    names = sorted(pydoc_data.topics.topics)
    random.Random(2).shuffle(names)
    return "\n\n".join(pydoc_data.topics.topics[name] for name in names)[:CHARACTERS]


def _sensors() -> str:
    """One home after the other, as many lines as fill about one sequence each."""
    homes: list[str] = []
    while sum(map(len, homes)) < CHARACTERS:
        homes.append("".join(_home(HELD_OUT_SEED + len(homes), 1200)))
    return "\n".join(homes)


def _home(seed: int, characters: int) -> Iterator[str]:
    day, told = "", 0
    for event in conversation(seed, PACE, epoch_s=1.6e9 + 86400 * 37 * (seed - HELD_OUT_SEED)):
        if told > characters:
            return
        if isinstance(event, Asked):
            line = f"{event.question.text} {event.question.answer}\n"
        else:
            assert isinstance(event, Heard)
            line = reading_line(event.observation())
            if (today := day_of(event.time_s)) != day:
                day = today
                line = day_line(day) + line
        told += len(line)
        yield line
