"""Circles are noticed soon; what only looks alike is not taken for one."""

from pathlib import Path

import pytest
from engine_driver import DrivenEngine
from hypothesis import given
from hypothesis import strategies as st
from scripted_decoder import Script, told
from scripted_model import ScriptedModel

from iotd.events import Done, FinishReason
from iotd.model import Model
from iotd.model.repetition import LEAST, LONGEST, ROUNDS, Repetition

TOKENS = st.lists(st.integers(0, 3), max_size=200)
CIRCLE = st.lists(st.integers(0, 9), min_size=1, max_size=LONGEST)


def noticed_after(tokens: list[int]) -> int | None:
    """Tokens up to where a circle is noticed."""
    repetition = Repetition()
    return next((n for n, token in enumerate(tokens, 1) if repetition.push(token)), None)


@given(before=TOKENS, circle=CIRCLE)
def test_a_circle_is_noticed_in_its_third_round(before: list[int], circle: list[int]) -> None:
    """A short one after LEAST tokens. It may have been noticed sooner: what stood before it can be a part of it."""
    enough = max(ROUNDS * len(circle), LEAST)
    found = noticed_after(before + circle * enough)
    assert found is not None and found <= len(before) + enough


@given(tokens=TOKENS)
def test_what_is_noticed_is_a_circle(tokens: list[int]) -> None:
    found = noticed_after(tokens)
    said = tokens[:found]

    def goes_round(period: int) -> bool:
        span = max(ROUNDS * period, LEAST)
        end = said[-span:]
        return len(end) == span and end[period:] == end[:-period]

    assert (found is not None) == any(goes_round(period) for period in range(1, LONGEST + 1))


@given(tokens=st.lists(st.integers(0, 1000), max_size=150, unique=True), again=st.integers(0, 150))
def test_what_comes_twice_is_no_circle(tokens: list[int], again: int) -> None:
    assert noticed_after(tokens + tokens[-again:]) is None


@pytest.mark.parametrize(
    "text",
    [
        "0 0 0 0 0 0 0 0 0 0 0 0",
        "| 0 | 0 | 0 |\n| 0 | 0 | 0 |\n| 0 | 0 | 0 |",
        "21.4, 21.4, 21.4, 21.4, 21.4, 21.4, 21.4",
        "The kitchen is warm. The hall is warm. The attic is warm. The cellar is warm. The porch is warm.",
        "14:01 on, 14:02 on, 14:03 on, 14:04 on, 14:05 on, 14:06 on, 14:07 on, 14:08 on, 14:09 on, 14:10 on",
        "-" * 40,
    ],
)
def test_tables_and_lists_are_no_circles(text: str) -> None:
    """Even where each character is a token."""
    assert noticed_after(list(text.encode())) is None


@pytest.fixture(scope="module")
def model(tiny_package: Path) -> Model:
    return Model.open(tiny_package, threads=1)


def test_an_answer_that_goes_round_in_circles_ends(model: Model) -> None:
    generation = Script(model, b"It is warm. " * 9).generation()
    assert told(generation) == ("", "It is warm. " * 4)
    assert generation.finish_reason is FinishReason.REPETITION


def test_a_thought_that_goes_round_in_circles_has_an_answer(model: Model) -> None:
    """Which may say the same again."""
    script = Script(model, [*b"Wait. " * 8, *b"Wait. " * 7, 258])
    generation = script.generation(thinking=True)
    assert told(generation) == ("Wait. " * 8, "Wait. " * 7)
    assert generation.finish_reason is FinishReason.STOP
    assert script.read == [*b"Wait. " * 8, *model.endings.thought, *b"Wait. " * 7]


def test_it_is_counted() -> None:
    engine = DrivenEngine(ScriptedModel(b"no " * 40))
    sink, _ = engine.ask(max_tokens=100)
    engine.settle()
    assert isinstance(sink.end, Done)
    assert sink.end.finish_reason is FinishReason.REPETITION
    assert engine.status().counters["asks_repetition"] == 1
