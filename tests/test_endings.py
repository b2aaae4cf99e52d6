"""How sentences end: what counts as an end, and how a model in haste is led to one."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_decoder import Script

from iotd.engine.sentences import Sentences
from iotd.events import FinishReason, Format, Sampling
from iotd.model import Model
from iotd.model.endings import ends_in_number, ends_sentence
from iotd.model.generation import MOST_BIAS

END = 258
STOP, ASK = ord("."), ord("?")


@pytest.fixture(scope="module")
def model(tiny_package: Path) -> Model:
    return Model.open(tiny_package, threads=1)


WHOLE = """It is.|It is. |Is it?!|He said “yes.”|"Yes!"|(It is.)|**It is.**|Well…|Well...|It is 21.4 °C.|23!|It is 23…
It is 23.…|暖かい。|「暖かい。」|暖かい！""".replace("\n", "|").split("|")


@pytest.mark.parametrize("text", [*WHOLE, "One\n", "- kitchen\n\n"])
def test_a_sentence_has_ended(text: str) -> None:
    assert ends_sentence(text)
    assert ends_sentence("Before. " * 9 + text)


@pytest.mark.parametrize("text", ["", "\n", "It is", "It is 23.", "It is 23", "Rooms:\n", "Rooms:\n\n", "one,\n", '"'])
def test_a_sentence_goes_on(text: str) -> None:
    assert not ends_sentence(text)


def test_a_number_may_go_on() -> None:
    assert all(map(ends_in_number, ["It is 23", "It is 23.", "at 14:", "2026-", "1,"]))
    assert not any(map(ends_in_number, ["", "It is 23 °C", "It is 23. ", "A."]))


def test_every_token_that_ends_a_sentence_does_so(model: Model) -> None:
    texts = {model.tokenizer.decode([token]) for token in model.endings.sentence}
    assert texts == {".", "!", "?"}  # a vocabulary of bytes has no longer ones
    assert model.tokenizer.decode(model.endings.ellipsis) == "…"


@given(haste=st.floats(0, 1), stop=st.floats(0.1, 9.9), end=st.floats(0.1, 9.9), n_before=st.integers(1, 10))
def test_haste_leads_to_ends_that_are_near_enough(
    model: Model, haste: float, stop: float, end: float, n_before: int
) -> None:
    generation = Script(model, b"It is warm and dry. ", {STOP: stop, END: end}).generation()
    for _ in range(n_before):
        generation.step()
    generation.haste = haste
    said, nearest = generation.step().answer, min(stop, end)
    if abs(haste * MOST_BIAS - nearest) < 0.01 or abs(stop - end) < 0.01:
        return
    if haste * MOST_BIAS < nearest:
        assert said == "It is warm and dry. "[n_before]
    else:
        assert (said, generation.finish_reason) == ((".", None) if stop < end else ("", FinishReason.STOP))


@pytest.mark.parametrize("text", ["I", "It is 2", "It is 23", "It is 23."])
def test_haste_ends_nothing_within_a_number_or_before_the_first_word(model: Model, text: str) -> None:
    n_before = len(text) if len(text) > 1 else 0
    generation = Script(model, b"It is 23.4 C", {STOP: 1, ASK: 1, END: 1}).generation()
    for _ in range(n_before):
        generation.step()
    generation.haste = 1.0
    assert generation.step().answer == "It is 23.4 C"[n_before]


def test_behind_a_whole_sentence_haste_ends_the_turn_and_nothing_else(model: Model) -> None:
    for below, ended in (({STOP: 0.1}, False), ({STOP: 0.1, END: 7.9}, True), ({END: 8.1}, False)):
        generation = Script(model, b"It is. It", below).generation()
        for _ in range(6):
            generation.step()
        generation.haste = 1.0
        assert generation.step().answer == ("" if ended else " ")
        assert generation.done == ended


def test_haste_does_not_reach_thoughts(model: Model) -> None:
    generation = Script(model, b"Let me see", {STOP: 0.1, END: 0.1}).generation(thinking=True)
    generation.haste = 1.0
    assert [generation.step().thought for _ in range(4)] == list("Let ")


def test_a_token_without_a_logit_is_not_led_to(model: Model) -> None:
    """A two-stage head leaves −∞ where no candidate is."""
    generation = Script(model, b"It is warm", {STOP: float("inf"), END: float("inf")}).generation()
    generation.haste = 1.0
    assert [generation.step().answer for _ in range(6)] == list("It is ")


@pytest.mark.parametrize(
    ("text", "n_before", "below", "expected", "reason"),
    [
        ("It is warm.", 0, {STOP: 1.0}, "I…", FinishReason.BUDGET),
        ("It is warm.", 5, {}, "It is …", FinishReason.BUDGET),
        ("It is warm.", 5, {STOP: 7.0}, "It is.", FinishReason.BUDGET),
        ("It is warm.", 10, {}, "It is warm.", FinishReason.BUDGET),
        ("It is warm.", 11, {}, "It is warm.", FinishReason.STOP),
        ("It is warm. It", 11, {}, "It is warm.", FinishReason.BUDGET),
        ("It is warm. It", 11, {END: 1.0}, "It is warm.", FinishReason.BUDGET),
        ("It is warm. It", 12, {}, "It is warm. ", FinishReason.BUDGET),
        ("It is 23.4", 8, {}, "It is 23.…", FinishReason.BUDGET),
        ("It is 23.4", 9, {}, "It is 23.4…", FinishReason.BUDGET),
        ("It is warm", 10, {}, "It is warm", FinishReason.STOP),
        ("21 °C", 3, {}, "21 …", FinishReason.BUDGET),
        ("Yes.°", 5, {}, "Yes.", FinishReason.BUDGET),
    ],
)
def test_the_last_step_ends_the_sentence_or_says_that_it_breaks_off(
    model: Model, text: str, n_before: int, below: dict[int, float], expected: str, reason: FinishReason
) -> None:
    """In the middle of a character too: its half is left out."""
    generation = Script(model, [*text.encode(), END], below).generation()
    said = "".join(generation.step().answer for _ in range(n_before))
    said += generation.conclude().answer + generation.flush().answer
    assert (said, generation.finish_reason) == (expected, reason)


def test_the_last_step_of_a_thought_is_one_of_the_answer(model: Model) -> None:
    script = Script(model, b"Let me see")
    generation = script.generation(thinking=True)
    assert generation.step() == ("", "L")
    script.go_on(b"Yes")
    assert generation.conclude() == ("Y…", "")
    assert not generation.thinking


def test_what_was_concluded_can_be_gone_on_with(model: Model) -> None:
    """All that was told has been read, or is still to be."""
    script = Script(model, b"It is warm")
    generation = script.generation()
    said = "".join(generation.step().answer for _ in range(4)) + generation.conclude().answer
    assert model.tokenizer.decode([*script.read, *generation.unread]) == said == "It is…"


def test_a_concluded_form_is_closed_once(model: Model) -> None:
    sampling = Sampling(seed=0)
    state = model.new_state(100)
    constraint = model.constraint(Format("regex", ("(ab)*c",)), 20)
    generation = model.generation(state, model.prefill(state, [1, 2]), sampling, constraint=constraint)
    said = generation.step().answer
    if not generation.done:
        said += generation.conclude().answer
        assert generation.finish_reason is FinishReason.BUDGET
        assert generation.close() == ("", "")
    assert said.endswith("c")
    assert generation.ending == ""


def test_sentences_know_whether_all_that_was_said_is_whole() -> None:
    sentences = Sentences()
    wholes = []
    for piece in ("It is", " warm.", " The door", " is open.", " It", " is 23", "…"):
        sentences.push(piece, near_end=True)
        wholes.append(sentences.whole)
    assert wholes == [False, True, False, True, False, False, True]
    assert not Sentences().whole


def test_a_sentence_that_breaks_off_behind_a_whole_one_is_left_out() -> None:
    """It is told where it is all there is."""
    for before, rest in (("It is warm.", ""), ("It is", " The…")):
        sentences = Sentences()
        told = sentences.push(before, near_end=True) + sentences.push(" The…", near_end=True)
        assert told + sentences.rest(cut_off=True) == before + rest
