"""Answers of a given form inside their budgets, on a manual clock."""

import json
from typing import Any

import jsonschema
import pytest
from engine_driver import DrivenEngine, Sink

from iotd.errors import DeadlineExceeded, InvalidInput
from iotd.events import Ask, Done, Failed, FinishReason, Format, Sampling

PREFILL_S, STEP_S = 0.02, 0.05
SCHEMA = {
    "type": "object",
    "properties": {
        "room": {"type": "string"},
        "warm": {"enum": ["yes", "yesterday", "no"]},
        "note": {"type": "string"},
    },
    "required": ["room", "warm", "note"],
    "additionalProperties": False,
}
FORM = Format("json_schema", (json.dumps(SCHEMA),))


def costly(**settings: Any) -> DrivenEngine:
    engine = DrivenEngine(**settings)
    engine.clock.costs_s = {"prefill": PREFILL_S, "step": STEP_S}
    return engine


def check(sink: Sink, reason: FinishReason) -> None:
    assert isinstance(sink.end, Done), sink.end
    assert sink.end.finish_reason is reason
    assert sink.end.usage.generation_tokens == len(sink.text.encode())
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(sink.text))


@pytest.mark.parametrize("drafting", [True, False])
def test_an_answer_is_valid_wherever_its_budget_ends_and_not_late(drafting: bool) -> None:
    """The fake model says letters without end: only its budget ends an answer. What a run takes is known after two."""
    texts = set()
    for n in range(30):
        engine = costly(drafting=drafting)
        deadline_s = engine.clock() + 0.5 + n * 0.13
        sink, _ = engine.ask(budget_s=deadline_s - engine.clock(), max_tokens=500, format=FORM)
        engine.settle()
        if isinstance(sink.end, Failed):
            assert isinstance(sink.end.error, DeadlineExceeded)
            assert sink.text == ""
            continue
        check(sink, FinishReason.BUDGET)
        texts.add(sink.text)
        assert len(texts) < 3 or deadline_s - 5 * STEP_S < engine.clock() <= deadline_s
    assert len(texts) > 20


def test_before_the_model_has_chosen_anything_there_is_no_answer() -> None:
    """Though its beginning is known: what is forced is no word of the model's."""
    engine = costly()
    sink, _ = engine.ask(budget_s=1.0, max_tokens=500, format=FORM)
    engine.turns_until(
        lambda: engine._worker._running is not None and engine._worker._running[1]._generation is not None
    )
    engine.clock.now_s += 1.0
    engine.settle()
    assert isinstance(sink.end, Failed)
    assert isinstance(sink.end.error, DeadlineExceeded)
    assert sink.text == ""


def test_an_answer_is_valid_by_whatever_max_tokens_it_is_cut() -> None:
    shortest = len('{"warm": "no", "room": "", "note": ""}')
    for max_tokens in range(shortest, shortest + 25):
        sink, _ = (engine := costly()).ask(max_tokens=max_tokens, format=FORM)
        engine.settle()
        check(sink, FinishReason.LENGTH)
        assert len(sink.text.encode()) <= max_tokens
    sink, _ = (engine := costly()).ask(max_tokens=shortest - 1, format=FORM)
    engine.settle()
    assert isinstance(sink.end, Failed)
    assert isinstance(sink.end.error, InvalidInput)
    assert sink.end.error.field == "json_schema"


def test_an_answer_ends_where_its_form_does() -> None:
    engine = costly()
    sink, _ = engine.ask(max_tokens=30, format=Format("regex", ("[a-z]{3}",)))
    engine.settle()
    assert isinstance(sink.end, Done)
    assert sink.end.finish_reason is FinishReason.STOP
    assert len(sink.text) == 3


def test_a_session_goes_on_behind_a_closed_answer() -> None:
    """The model reads all of it before the next question, what it has not said itself included."""
    engine = costly()
    sink, _ = engine.ask(budget_s=2.0, max_tokens=500, format=FORM, keep_session=True)
    engine.settle()
    check(sink, FinishReason.BUDGET)
    assert isinstance(sink.end, Done)
    further, _ = engine.ask("why?", session=sink.end.session)
    engine.settle()
    assert isinstance(further.end, Done)
    assert sink.text in engine.fork.text


def test_a_format_is_checked_before_its_turn() -> None:
    engine = costly()
    bad = Format("regex", ("(",))
    with pytest.raises(InvalidInput):
        engine.check_format(Ask("how?", 0.0, 1.0, format=bad))
    engine.check_format(Ask("how?", 0.0, 1.0, format=FORM))
    engine.check_format(Ask("how?", 0.0, 1.0))
    with pytest.raises(InvalidInput):
        engine.check_format(Ask("how?", 0.0, 1.0, format=FORM, sampling=Sampling(max_tokens=10)))
