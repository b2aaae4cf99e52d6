"""Asks with labels: weighed on a fork, in units between which they can be stopped, inside their budgets."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_driver import DrivenEngine, Sink, reading
from fake_model import CONTROLS, FakeModel

from iotd.errors import ContextOverflow, DeadlineExceeded, InvalidInput
from iotd.events import Done, Failed, FinishReason, Labels, Weighed
from iotd.model import Model

PREFILL_S, VERIFY_S = 0.01, 0.05
CLOSE = 256 + CONTROLS.index("<close>")
QUESTION = "how warm?"
LONG = Labels(("warm", "warmer", "cold", "freezing cold"), none_of_these=True)


def weigh(engine: DrivenEngine, labels: Labels, **changes: Any) -> Done:
    sink, _ = engine.ask(QUESTION, labels=labels, **changes)
    engine.settle()
    assert isinstance(sink.end, Done), sink.end
    assert sink == [sink.end]
    return sink.end


def weighed(done: Done) -> Weighed:
    assert done.weighed is not None
    return done.weighed


def by_hand(model: FakeModel, trace: list[Any], label: str) -> float:
    state = model.new_state(4096)
    state.trace = list(trace)
    total = 0.0
    for token in label.encode():
        logits = model.logits(state).astype(np.float64)
        total += logits[token] - np.logaddexp.reduce(logits)
        state.trace.append(token)
    return total


def failure(sink: Sink) -> Exception:
    assert isinstance(sink.end, Failed), sink.end
    return sink.end.error


def test_labels_are_weighed_over_the_context_and_the_question() -> None:
    engine = DrivenEngine()
    engine.observe(reading(0))
    engine.settle()
    before = [*engine.live.trace]
    done = weigh(engine, LONG)
    assert (done.finish_reason, done.session) == (FinishReason.STOP, "")
    trace = [*before, *QUESTION.encode(), CLOSE]
    found = {score.label: score.log_probability for score in weighed(done).labels}
    expected = {label: by_hand(engine.model, trace, label) for label in LONG.texts}
    expected["warm"] = math.log(math.exp(expected["warm"]) - math.exp(expected["warmer"]))
    assert found == pytest.approx(expected, abs=1e-4)
    assert engine.live.trace == before
    assert (done.usage.context_tokens, done.usage.prompt_tokens, done.usage.generation_tokens) == (
        len(before),
        len(QUESTION) + 1,
        0,
    )


def test_labels_of_one_token_take_what_reading_the_question_takes() -> None:
    runs: list[str] = []
    engine = DrivenEngine(FakeModel(lambda what, _: runs.append(what)))
    runs.clear()
    done = weigh(engine, Labels(("y", "n")))
    assert runs == ["prefill"]
    assert len(weighed(done).labels) == 2


def test_an_answer_is_the_same_before_and_behind() -> None:
    engine = DrivenEngine()
    first = engine.answer()
    weigh(engine, LONG)
    assert engine.answer() == first


@pytest.mark.parametrize(("missing_runs", "in_time"), [(1.5, False), (0.5, False), (-0.5, True)])
def test_long_labels_are_weighed_in_units_between_which_the_deadline_is_kept(
    missing_runs: float, in_time: bool
) -> None:
    n_runs = len(("freezing", "freezing col", "warme", "col"))
    engine = DrivenEngine()

    def charge(what: str, n_tokens: int) -> None:
        engine.clock.now_s += PREFILL_S * n_tokens if what == "prefill" else VERIFY_S
        # What the thread does that watches deadlines, while a unit runs.
        engine._asks.settle(engine.clock())

    engine.model.on_run = charge
    needed_s = PREFILL_S * (len(QUESTION) + 1) + VERIFY_S * n_runs
    deadline_s = engine.clock() + needed_s - VERIFY_S * missing_runs
    sink, _ = engine.ask(QUESTION, budget_s=deadline_s - engine.clock(), labels=LONG)
    engine.settle()
    assert engine.clock() < deadline_s + VERIFY_S
    if in_time:
        assert isinstance(sink.end, Done)
        assert sink.end.timings.prefill_s == pytest.approx(needed_s)
        assert (sink.end.timings.decode_s, sink.end.timings.first_token_s) == (0.0, 0.0)
    else:
        assert isinstance(failure(sink), DeadlineExceeded)


def test_a_cancel_stops_the_weighing_within_one_run() -> None:
    runs: list[str] = []
    engine = DrivenEngine(FakeModel(lambda what, _: runs.append(what)))
    sink, ticket = engine.ask(QUESTION, labels=LONG)
    engine.turns_until(lambda: runs.count("verify") == 1)
    ticket.cancel()
    engine.settle()
    assert runs.count("verify") == 1
    assert isinstance(sink.end, Done)
    assert (sink.end.finish_reason, sink.end.weighed) == (FinishReason.CANCELLED, None)


def test_labels_that_cannot_be_scored_fail_before_anything_runs() -> None:
    runs: list[str] = []
    engine = DrivenEngine(FakeModel(lambda what, _: runs.append(what)))
    runs.clear()
    with pytest.raises(InvalidInput) as refusal:
        engine.ask(labels=Labels(("a", "b" * 129)))
    engine.settle()
    assert (refusal.value.field, runs) == ("labels[1]", [])


def test_the_longest_label_has_to_fit_behind_the_question() -> None:
    engine = DrivenEngine()
    question = "x" * (engine.live.available - 1 - 20)
    for length, fits in ((20, True), (21, False)):
        with nullcontext() if fits else pytest.raises(ContextOverflow):
            engine.ask(question, labels=Labels(("a", "b" * length)))


@pytest.mark.parametrize("head", ["exact", "two-stage", "coarse"])
def test_the_engine_asks_for_exact_logits(tiny_package: Path, head: Any) -> None:
    """Scores behind the last chunk of the question are those of an exact head."""
    engines = [
        DrivenEngine(Model.open(tiny_package, threads=1, head=kind), window=1024, reserve_tokens=512)  # type: ignore[arg-type]
        for kind in ("exact", head)
    ]
    labels = Labels(("yes", "no", "y"), none_of_these=True)
    expected, found = (weighed(weigh(engine, labels)) for engine in engines)
    assert [s.probability for s in found.labels] == pytest.approx([s.probability for s in expected.labels], abs=1e-6)
    assert found.none_probability == pytest.approx(expected.none_probability)
