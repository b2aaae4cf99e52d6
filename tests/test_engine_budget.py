"""Never late: whatever is accepted ends by its deadline, on a manual clock and a model whose runs take their time."""

import random

import pytest
from engine_driver import DrivenEngine, Sink, frame, image, reading
from fake_model import FakeModel
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scripted_model import ScriptedModel

from iotd.errors import Overloaded
from iotd.events import Done, FinishReason, Format, Labels

PREFILL_S, STEP_S, ENCODE_S, VERIFY_S = 0.010, 0.050, 0.020, 0.010
CHOICES = Format("choices", ("yes", "no", "it cannot be told"))


def costly(model: FakeModel | None = None, **settings: object) -> DrivenEngine:
    """An engine on a machine whose costs are known, at work on a stream."""
    engine = DrivenEngine(model, window=1024, reserve_tokens=512, **settings)
    engine.clock.costs_s = {
        "prefill": PREFILL_S,
        "place": PREFILL_S,
        "step": STEP_S,
        "encode": ENCODE_S,
        "verify": VERIFY_S,
    }
    engine._calibrate()
    return engine


class Asked:
    """One accepted ask, and the time it was asked at."""

    def __init__(self, engine: DrivenEngine, budget_s: float, sink: Sink) -> None:
        self.deadline_s = engine.clock() + budget_s
        self.sink = sink
        self.ended_s: float | None = None

    def look(self, now_s: float) -> None:
        if self.ended_s is None and self.sink.end is not None:
            self.ended_s = now_s


ASKS = st.tuples(
    st.integers(0, 25),  # turns before it
    st.sampled_from(("short", "long", "form", "labels", "images", "thinking")),
    st.floats(0.05, 8.0),  # its budget
)


def kind(name: str) -> dict[str, object]:
    match name:
        case "long":
            return {"max_tokens": 200}
        case "form":
            return {"max_tokens": 60, "format": CHOICES}
        case "labels":
            return {"labels": Labels(("yes", "no", "never"))}
        case "images":
            return {"images": (image(),), "max_tokens": 20}
        case "thinking":
            return {"thinking": True, "max_tokens": 120}
    return {"max_tokens": 12}


THOUGHT_IN_THE_WAY = [
    *((0, "short", 3.0), (0, "long", 2.0), (18, "thinking", 6.0)),
    *((12, "short", 1.0), (19, "short", 2.0), (25, "short", 2.0)),
]
"""The last one is accepted behind a thought that has to end for it."""


@settings(max_examples=60)
@example(asks=THOUGHT_IN_THE_WAY, flood=False, eos_every=0)
@given(asks=st.lists(ASKS, min_size=1, max_size=14), flood=st.booleans(), eos_every=st.sampled_from((0, 15)))
def test_what_is_accepted_ends_by_its_deadline(asks: list[tuple[int, str, float]], flood: bool, eos_every: int) -> None:
    engine = costly(FakeModel(eos_every=eos_every), chunk_s=0.1, queue=32)
    accepted: list[Asked] = []

    def turn(n: int) -> bool:
        if flood:
            engine.observe(frame(n) if n % 20 == 0 else reading(n))
        moved = engine.turn()
        for asked in accepted:
            asked.look(engine.clock())
        return moved

    for index, (turns, name, budget_s) in enumerate(asks):
        for n in range(turns):
            turn(1000 * index + n)
        try:
            sink, _ = engine.ask(f"{name} {index}?", budget_s, **kind(name))
        except Overloaded as refusal:
            assert refusal.needed_s is not None and refusal.needed_s > budget_s * 0.999
            continue
        accepted.append(Asked(engine, budget_s, sink))
    flood = False
    while turn(0):
        pass
    for asked in accepted:
        assert isinstance(asked.sink.end, Done), asked.sink.end
        assert asked.ended_s is not None and asked.ended_s <= asked.deadline_s + 1e-9
    assert engine.status().counters["asks_expired"] == 0


def test_an_urgent_ask_goes_before_a_long_answer_that_then_goes_on() -> None:
    alone = costly()
    whole, _ = alone.ask("tell me all!", budget_s=60.0, max_tokens=100)
    alone.settle()
    engine = costly()
    long, _ = engine.ask("tell me all!", budget_s=60.0, max_tokens=100)
    engine.turns_until(lambda: len(long.text) == 5)
    urgent, ticket = engine.ask("fire?", budget_s=0.4)
    assert ticket.accepted.queue_position == 0
    engine.turns_until(lambda: urgent.end is not None)
    assert isinstance(urgent.end, Done) and urgent.end.timings.total_s <= 0.4
    assert long.end is None and len(long.text) <= 6
    engine.settle()
    assert long.text == whole.text
    assert isinstance(long.end, Done)
    assert long.end.finish_reason is FinishReason.LENGTH
    assert long.end.timings.queue_s == pytest.approx(urgent.end.timings.total_s, abs=0.1)
    assert engine.status().counters["asks_preempted"] == 1


def test_a_long_answer_is_cut_short_for_others_only_where_it_cannot_go_on_later() -> None:
    engine = costly()
    deadline_s = engine.clock() + 6.0
    long, _ = engine.ask("tell me all!", budget_s=6.0, max_tokens=1000)
    engine.turns_until(lambda: len(long.text) == 30)
    left_s = deadline_s - engine.clock()
    others = [engine.ask(f"{n}?", budget_s=left_s + 0.1, max_tokens=8)[0] for n in range(3)]
    engine.settle()
    assert all(isinstance(other.end, Done) and other.end.timings.total_s <= left_s + 0.1 for other in others)
    assert isinstance(long.end, Done) and long.end.finish_reason is FinishReason.BUDGET
    assert long.end.timings.total_s < 6.0


def test_a_stall_takes_from_those_that_wait_before_it_takes_what_was_kept_for_the_running_one() -> None:
    engine = costly()
    running, ticket = engine.ask("tell me all!", budget_s=4.0, max_tokens=1000)
    kept = ticket.accepted.plan.reserved_tokens
    engine.turns_until(lambda: len(running.text) == 3)
    others = [engine.ask(f"{n}?", budget_s=4.2 + n, max_tokens=40)[0] for n in range(2)]
    engine.clock.costs_s["step"] = engine._asks.latest_start_s + 0.1 - engine.clock()
    engine.turn()
    engine.clock.costs_s["step"] = STEP_S
    engine.settle()
    assert isinstance(running.end, Done) and running.end.timings.total_s <= 4.0
    assert running.end.usage.generation_tokens >= kept
    for n, other in enumerate(others):
        assert isinstance(other.end, Done) and other.end.timings.total_s <= 4.2 + n
        assert other.text


def test_no_sentence_is_begun_in_the_time_that_is_kept_for_others() -> None:
    engine = costly(ScriptedModel(b"It is warm. The window stands open, and all of the doors."))
    running, _ = engine.ask("tell me all!", budget_s=4.0, max_tokens=200)
    engine.turns_until(lambda: running.text == "It")
    others = [engine.ask(f"{n}?", budget_s=4.1, max_tokens=12)[0] for n in range(4)]
    engine.settle()
    assert running.text == "It is warm."
    assert isinstance(running.end, Done) and running.end.finish_reason is FinishReason.BUDGET
    assert running.end.timings.total_s < 11 * STEP_S + 0.3
    for other in others:
        assert isinstance(other.end, Done) and other.end.finish_reason is FinishReason.LENGTH


def test_a_cancelled_ask_costs_nothing_more_also_where_it_had_made_way() -> None:
    engine = costly()
    began_s = engine.clock()
    long, ticket = engine.ask("tell me all!", budget_s=60.0, max_tokens=100)
    engine.turns_until(lambda: len(long.text) == 5)
    urgent, _ = engine.ask("fire?", budget_s=0.4)
    engine.turns_until(lambda: bool(urgent.text))
    ticket.cancel()
    engine.settle()
    ended_s = engine.clock()
    assert isinstance(long.end, Done) and long.end.finish_reason is FinishReason.CANCELLED
    assert isinstance(urgent.end, Done) and urgent.end.finish_reason is FinishReason.LENGTH
    assert ended_s - began_s < urgent.end.timings.total_s + 1.0
    assert engine.status().queue_depth == 0


def test_a_refusal_says_with_which_budget_it_would_have_been_accepted() -> None:
    engine = costly()
    engine.ask(budget_s=60.0, max_tokens=100)
    with pytest.raises(Overloaded, match="the shortest answer would take") as refusal:
        engine.ask(budget_s=0.1)
    needed_s = refusal.value.needed_s
    assert needed_s is not None
    engine.ask(budget_s=needed_s * 1.01)
    assert engine.status().counters["asks_refused"] == 1


def test_a_machine_that_becomes_slow_is_planned_for_within_a_few_steps() -> None:
    engine = costly()
    chance = random.Random(0)
    late = 0
    for n in range(60):
        slowness = 3.0 if 20 <= n < 40 else 1.0
        engine.clock.costs_s |= {"prefill": PREFILL_S * slowness, "step": STEP_S * slowness}
        budget_s = chance.uniform(1.0, 4.0)
        try:
            sink, _ = engine.ask(f"{n}?", budget_s, max_tokens=100)
        except Overloaded:
            continue
        engine.settle()
        assert isinstance(sink.end, Done)
        late += sink.end.timings.total_s > budget_s
    assert late <= 1


def test_the_model_is_told_how_many_words_there_is_time_for() -> None:
    engine = costly(tell_length=True)
    for question, budget_s, told in (("how warm?", 1.0, " "), ("how cold", 1.0, "\n"), ("how wet?", 60.0, None)):
        engine.ask(question, budget_s=budget_s, max_tokens=200)
        engine.turns_until(lambda question=question: f"{question}" in engine.fork.text)
        behind = engine.fork.text.rpartition(question)[2].partition("<close>")[0]
        if told is None:
            assert behind == ""
        else:
            assert behind.startswith(f"{told}Answer in at most ")
            assert 2 <= int(behind.split()[4]) <= 12
        engine.settle()
