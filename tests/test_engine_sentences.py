"""An answer whose time ends is told up to its last whole sentence; every other is told whole, as it comes."""

from itertools import pairwise

import pytest
from engine_driver import DrivenEngine
from hypothesis import given
from hypothesis import strategies as st
from scripted_model import ScriptedModel

from iotd.engine.sentences import Sentences
from iotd.events import Done, FinishReason

TEXTS = st.text(st.sampled_from("ab .!?\n1°)"), max_size=60)


def told(pieces: list[str], near_from: int, *, cut_off: bool) -> str:
    sentences = Sentences()
    text = "".join(sentences.push(piece, near_end=n >= near_from) for n, piece in enumerate(pieces))
    return text + sentences.rest(cut_off=cut_off)


def test_near_the_end_a_sentence_is_told_when_it_is_whole() -> None:
    sentences = Sentences()
    assert sentences.push("It is warm.", near_end=False) == "It is warm."
    assert sentences.push(" The door", near_end=True) == ""
    assert sentences.push(" is open. The", near_end=True) == " The door is open. "
    assert sentences.push(" win", near_end=True) == ""
    assert sentences.rest(cut_off=True) == ""


def test_a_sentence_that_has_begun_is_told_as_it_comes() -> None:
    assert told(["It is", " warm. The", " win", "dow"], 1, cut_off=True) == "It is warm. The window"


@pytest.mark.parametrize(
    ("held", "kept"),
    [(" It is 21.", ""), (" It is 21.4 °C", ""), (" It is 21.4 °C.", " It is 21.4 °C."), (' "Yes!"', ' "Yes!"')],
)
def test_a_point_within_a_number_ends_nothing(held: str, kept: str) -> None:
    assert told(["Yes.", held], 1, cut_off=True) == f"Yes.{kept}"


@given(text=TEXTS, cuts=st.lists(st.integers(0, 60)), near_from=st.integers(0, 8))
def test_an_answer_that_ends_by_itself_is_told_whole(text: str, cuts: list[int], near_from: int) -> None:
    places = [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(places)]
    assert told(pieces, near_from, cut_off=False) == text
    cut = told(pieces, near_from, cut_off=True)
    assert text.startswith(cut)


def test_a_budget_that_ends_within_a_sentence_leaves_it_out() -> None:
    text = "It is warm. The window stands open."
    model = ScriptedModel(text.encode())
    engine = DrivenEngine(model)
    engine.clock.costs_s = {"step": 0.1}
    sink, _ = engine.ask(max_tokens=200)
    engine.settle()
    assert isinstance(sink.end, Done)
    assert sink.text == text
    for left_out in (3, 10, 17):
        budget_s = sink.end.timings.total_s * (1 - left_out / len(text))
        cut, _ = engine.ask(budget_s=budget_s, max_tokens=200)
        engine.settle()
        assert isinstance(cut.end, Done)
        assert cut.end.finish_reason is FinishReason.BUDGET
        assert cut.text.rstrip() == "It is warm."
