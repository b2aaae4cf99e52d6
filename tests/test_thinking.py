"""Thoughts: told apart from the answer, ended by the model, by its turn's end, or by force."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_driver import DrivenEngine
from fake_model import CONTROLS, EOS
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_decoder import Script, told
from scripted_model import ScriptedModel

from iotd.config import AskConfig
from iotd.engine.plan import LEAST_TOKENS
from iotd.events import Delta, Done, FinishReason, Sampling
from iotd.model import Model
from iotd.model.generation import Generation
from iotd.rpc.request import parse
from iotd.v1 import iotd_pb2

THINK_END = 256 + CONTROLS.index("</think>")


@pytest.fixture(scope="module")
def model(tiny_package: Path) -> Model:
    return Model.open(tiny_package, threads=1)


def thinking(model: Model, tokens: Sequence[int], **options: Any) -> tuple[Script, Generation]:
    script = Script(model, tokens)
    return script, script.generation(thinking=True, **options)


def end_of(model: Model) -> int:
    assert model.endings.thought_end is not None
    return model.endings.thought_end


def test_what_ends_a_thought_is_the_templates(model: Model) -> None:
    assert model.tokenizer.decode(model.endings.thought, skip_special=False) == "\n</think>\n\n"
    assert model.tokenizer.decode([end_of(model)], skip_special=False) == "</think>"


def test_a_model_that_ends_its_thought_goes_on_with_its_answer(model: Model) -> None:
    """What the template has behind a thought is read with its end, and more white space is left out."""
    end = end_of(model)
    script, generation = thinking(model, [*b"Hm.\n", end, *b"\n Yes.", 258])
    assert generation.thinking
    assert told(generation) == ("Hm.\n", "Yes.")
    assert not generation.thinking
    assert script.read == [*b"Hm.\n", end, *b"\n\n", *b"\n Yes."]
    assert (generation.n_thinking_tokens, generation.n_tokens) == (7, 13)
    assert generation.finish_reason is FinishReason.STOP


def test_the_end_of_the_turn_ends_a_thought_only(model: Model) -> None:
    script, generation = thinking(model, [*b"Hm", 258, *b"Yes", 258])
    assert told(generation) == ("Hm", "Yes")
    assert script.read == [*b"Hm", *model.endings.thought, *b"Yes"]


@pytest.mark.parametrize("n_thought", [0, 1, 5])
def test_a_thought_is_ended_by_force_in_one_run(model: Model, n_thought: int) -> None:
    script, generation = thinking(model, b"Let me see: yes.....")
    said = [generation.step() for _ in range(n_thought)]
    script.go_on([*b"Yes", 258])
    n_runs = script.n_runs
    generation.end_thought()
    assert not generation.thinking and len(generation.unread) == 4 + (n_thought > 0)
    assert generation.step() == ("Y", "")
    assert script.n_runs == n_runs + 1
    generation.end_thought()
    assert told(generation) == ("", "es")
    assert "".join(each.thought for each in said) == "Let me see: yes"[:n_thought]
    assert script.read == [*b"Let me see"[:n_thought], *model.endings.thought, *b"Yes"]


def test_digits_come_again_in_thoughts_and_in_the_answer(model: Model) -> None:
    """As a daemon draws by default, where the model is sure of a number and no less sure of it the second time."""
    options = iotd_pb2.SamplingOptions(thinking=True)
    defaults = parse(iotd_pb2.AskRequest(question="?", sampling=options), 0.0, 1.0, AskConfig()).sampling
    assert defaults.thoughts is not None and defaults.thoughts.presence_penalty == 1.5
    below = dict.fromkeys(b"0123456789", 6.0)
    for seed in range(100):
        script = Script(model, [*b"11", end_of(model), *b"11", 258], below)
        assert told(script.generation(**{**asdict_of(defaults), "seed": seed})) == ("11", "11"), seed


def asdict_of(sampling: Sampling) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in Sampling.__slots__}


def test_stop_strings_count_in_the_answer_alone(model: Model) -> None:
    end = end_of(model)
    _, generation = thinking(model, [*b"One.\n\nTwo.", end, *b"\nThree.\n\nFour", 258], stop=("\n",))
    assert told(generation) == ("One.\n\nTwo.", "Three.")


def test_all_tokens_count_and_an_answer_that_has_no_room_is_none(model: Model) -> None:
    """What ends a thought is only said where an answer fits behind it."""
    for capacity, most in ((1000, 8), (7, 100)):
        _, generation = thinking(model, b"Let me see.", capacity=capacity, max_tokens=most)
        assert told(generation) == ("Let me see."[:8], "")
        assert (generation.n_tokens, generation.finish_reason) == (8, FinishReason.LENGTH)
        _, generation = thinking(model, b"Let me see.", capacity=capacity, max_tokens=most)
        for _ in range(5):
            generation.step()
        generation.end_thought()
        assert (generation.done, generation.finish_reason) == (True, FinishReason.LENGTH)
        assert generation.step() == ("", "")
        assert generation.unread == [*b"m"]


def test_a_template_without_thoughts_tells_everything_as_the_answer(model: Model) -> None:
    generation = Script(model, [*b"Hm", end_of(model), *b"Yes", 258]).generation(thinking=False)
    assert not generation.thinking
    assert told(generation) == ("", "HmYes")


TEXT = st.text(st.sampled_from("ab \nü😀"), max_size=12)


@settings(max_examples=100)
@given(thought=TEXT, answer=TEXT, forced=st.none() | st.integers(0, 30))
def test_whatever_is_said_is_told_once_as_what_it_is(
    model: Model, thought: str, answer: str, forced: int | None
) -> None:
    """But for the white space between thoughts and answer; a thought may end within a character."""
    n_thought = len(thought.encode()) if forced is None else min(forced, len(thought.encode()))
    script, generation = thinking(model, [*thought.encode()[:n_thought], end_of(model), *answer.encode(), 258])
    said = [generation.step() for _ in range(n_thought)]
    if forced is not None:
        generation.end_thought()
        script.go_on([*answer.encode(), 258])
    while not generation.done:
        said.append(generation.step())
    said.append(generation.flush())
    expected = model.tokenizer.decode(thought.encode()[:n_thought]), answer.lstrip()
    assert ("".join(each.thought for each in said), "".join(each.answer for each in said)) == expected
    kinds = [bool(each.answer) for each in said if each.answer or each.thought]
    assert kinds == sorted(kinds)


@settings(max_examples=30)
@given(first=st.integers(0, 255), n_thought=st.integers(0, 12))
def test_a_thought_ended_by_force_is_as_if_it_had_been_read(model: Model, first: int, n_thought: int) -> None:
    """The answer is that after a prompt of thought and end, with guesses at what follows and without."""
    sampling = Sampling(temperature=0.0, presence_penalty=0.0, max_tokens=40)
    prompt = [first, 7, 8, 9]
    for said in (None, [*range(60), *prompt, *range(60), *prompt]):
        state = model.new_state(200)
        generation = model.generation(state, model.prefill(state, prompt), replace(sampling, thinking=True), said=said)
        thought: list[int] = []
        while generation.n_tokens < n_thought:
            generation.step(guess=False)
            thought += generation.unread
        if not generation.thinking:
            return
        generation.end_thought()
        left = 40 - generation.n_tokens
        found = told(generation)[1]
        state = model.new_state(200)
        logits = model.prefill(state, [*prompt, *thought, *model.endings.thought])
        expected = model.generation(state, logits, replace(sampling, max_tokens=left))
        assert found == told(expected)[1].lstrip()


def test_generate_leaves_thoughts_out(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(model, [*b"Hm.", end_of(model), *b"Yes.", 258])
    monkeypatch.setattr(model, "generation", lambda *_: script.generation(thinking=True))
    assert "".join(model.generate([{"role": "user", "content": "Is it?"}], thinking=True)) == "Yes."


def test_the_engine_tells_thoughts_before_the_answer() -> None:
    engine = DrivenEngine(ScriptedModel([*b"Hm.", THINK_END, *b"Yes.", EOS]))
    sink, _ = engine.ask(thinking=True, max_tokens=50)
    engine.settle()
    deltas = [event for event in sink if isinstance(event, Delta)]
    assert deltas == [*(Delta(letter, thought=True) for letter in "Hm."), *map(Delta, "Yes.")]
    assert isinstance(sink.end, Done)
    assert sink.end.usage.generation_tokens == 8


def test_a_thought_is_not_the_first_word() -> None:
    engine = DrivenEngine(ScriptedModel([*b"Hm.", THINK_END, *b"Yes.", EOS]))
    engine.clock.costs_s = {"step": 1.0}
    sink, _ = engine.ask(thinking=True, max_tokens=50)
    engine.settle()
    assert isinstance(sink.end, Done)
    assert sink.end.timings.first_token_s == pytest.approx(4.0)


def test_thoughts_that_would_take_all_the_time_make_way_for_an_answer() -> None:
    engine = DrivenEngine(ScriptedModel(b"Let me see, and see again and again, for as long as there is."))
    engine.clock.costs_s = {"step": 1.0}
    engine._calibrate()
    sink, _ = engine.ask(thinking=True, max_tokens=200, budget_s=50.5)
    engine.settle()
    assert sink.thoughts.startswith("Let")
    assert len(sink.text) >= LEAST_TOKENS
    assert isinstance(sink.end, Done) and sink.end.finish_reason is FinishReason.BUDGET
    assert sink.end.timings.total_s <= 50.5
