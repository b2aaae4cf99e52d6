"""Answering: forks, budgets on a manual clock, cancels, order, refusals, defects."""

import gc
import logging
import weakref
from typing import Any

import numpy as np
import pytest
from engine_driver import SYSTEM, DrivenEngine, Sink, frame, image, reading
from fake_model import CONTROLS, FakeModel

from iotd.config import AskConfig
from iotd.engine.answer import Answer
from iotd.engine.context import SLACK_TOKENS
from iotd.engine.plan import ANSWER_SHARE
from iotd.engine.worker import MOST_OWED_S, READING_SHARE
from iotd.errors import (
    ContextOverflow,
    DeadlineExceeded,
    Internal,
    InvalidInput,
    IotdError,
    NotFound,
    Overloaded,
    Unavailable,
)
from iotd.events import MAX_CAMERAS, Ask, Delta, Done, Failed, FinishReason

PREFILL_S, STEP_S, ENCODE_S = 0.010, 0.050, 0.020
CLOSE, THINK = (256 + CONTROLS.index(name) for name in ("<close>", "<think>"))
N_OPENING = len(SYSTEM) + 3


def costly(**settings: object) -> DrivenEngine:
    """An engine whose model takes time on the manual clock."""
    engine = DrivenEngine(**settings)
    engine.clock.costs_s = {"prefill": PREFILL_S, "place": PREFILL_S, "step": STEP_S, "encode": ENCODE_S}
    before_s = engine.clock()
    engine._calibrate()
    engine.clock.now_s = engine.costs.busy_until_s = before_s
    return engine


def reason(sink: Sink) -> FinishReason:
    assert isinstance(sink.end, Done), sink.end
    return sink.end.finish_reason


def error(sink: Sink) -> IotdError:
    assert isinstance(sink.end, Failed), sink.end
    return sink.end.error


def greedy(model: FakeModel, engine: DrivenEngine, prompt: list[int], n_tokens: int) -> str:
    """The answer by hand: the context, the prompt, and one letter after the other."""
    state = model.new_state(4096)
    state.trace = [*engine.live.trace, *prompt]
    text = ""
    for _ in range(n_tokens):
        token = int(model.logits(state).argmax())
        text += chr(token)
        state.trace.append(token)
    return text


def test_the_answer_continues_the_context_and_the_question() -> None:
    engine = DrivenEngine()
    engine.observe(reading(0))
    engine.settle()
    prompt = [*b"how warm?", CLOSE]
    assert engine.answer("how warm?", max_tokens=6) == greedy(engine.model, engine, prompt, 6)


def test_a_fork_never_changes_its_parent() -> None:
    asked, quiet = DrivenEngine(), DrivenEngine()
    for n in range(60):
        for engine in (asked, quiet):
            engine.observe(reading(n))
            engine.settle()
        before = list(asked.live.trace)
        asked.answer(f"question {n}")
        assert asked.live.trace == before
    assert asked.live.trace == quiet.live.trace
    assert np.array_equal(asked.model.logits(asked.live), quiet.model.logits(quiet.live))


def test_without_the_context_only_the_system_prompt_is_before_the_question() -> None:
    engine, empty = DrivenEngine(), DrivenEngine()
    engine.observe(reading(0))
    engine.settle()
    sink, _ = engine.ask(use_context=False)
    engine.settle()
    assert sink.text == empty.answer()
    assert isinstance(sink.end, Done)
    assert sink.end.usage.context_tokens == N_OPENING
    assert sink.end.usage.prompt_tokens == len("how?") + 1


def test_thinking_changes_how_the_turn_closes() -> None:
    engine = DrivenEngine()
    prompt = [*b"how?", CLOSE, THINK]
    sink, _ = engine.ask(thinking=True, max_tokens=64)
    engine.settle()
    assert sink.thoughts
    assert greedy(engine.model, engine, prompt, 64).startswith(sink.thoughts)
    assert len(sink.text) >= 64 * ANSWER_SHARE


def test_control_tokens_in_a_question_stay_text() -> None:
    engine = DrivenEngine()
    assert engine.answer("<close>") == greedy(engine.model, engine, [*b"<close>", CLOSE], 4)


def test_usage_and_timings_add_up() -> None:
    engine = costly(chunk_tokens=8)
    engine.observe(reading(0))
    engine.settle()
    context_tokens = engine.live.position
    first, _ = engine.ask("first?", max_tokens=3)
    second, _ = engine.ask("second?", images=(image(),), max_tokens=5)
    engine.settle()
    assert isinstance(first.end, Done) and isinstance(second.end, Done)
    usage, timings = second.end.usage, second.end.timings
    assert (usage.context_tokens, usage.image_tokens, usage.generation_tokens) == (context_tokens, 16, 5)
    assert usage.prompt_tokens == 16 + len("second?") + len("\n") + 3
    assert timings.queue_s == pytest.approx(first.end.timings.total_s)
    assert timings.image_s == pytest.approx(16 * ENCODE_S)
    assert timings.prefill_s == pytest.approx(usage.prompt_tokens * PREFILL_S)
    assert timings.decode_s == pytest.approx(4 * STEP_S)
    assert timings.first_token_s == pytest.approx(timings.queue_s + timings.image_s + timings.prefill_s)
    assert timings.total_s == pytest.approx(timings.first_token_s + timings.decode_s)
    assert engine.status().counters["generation_tokens"] == 8


def test_max_tokens_ends_with_length() -> None:
    engine = DrivenEngine()
    sink, _ = engine.ask(max_tokens=7)
    engine.settle()
    assert (reason(sink), len(sink.text)) == (FinishReason.LENGTH, 7)


def test_the_end_of_the_turn_ends_with_stop() -> None:
    engine = DrivenEngine(FakeModel(eos_every=5))
    sink, _ = engine.ask(max_tokens=100)
    engine.settle()
    assert reason(sink) is FinishReason.STOP
    assert len(sink.text) < 100


def test_a_full_state_ends_with_length() -> None:
    engine = DrivenEngine(window=64, reserve_tokens=64, system="")
    sink, _ = engine.ask(max_tokens=10_000)
    engine.settle()
    assert reason(sink) is FinishReason.LENGTH
    n_prompt = engine.live.position + len("how?") + 1
    assert len(sink.text) == 64 + SLACK_TOKENS + 64 - n_prompt + 1  # the last token is not read


def test_a_question_that_does_not_fit_fails_before_anything_runs() -> None:
    engine = DrivenEngine(window=256, reserve_tokens=64)
    runs: list[str] = []
    engine.model.on_run = lambda what, n_tokens: runs.append(what)
    with pytest.raises(ContextOverflow):
        engine.ask("x" * 400, images=(image(),))
    engine.settle()
    assert runs == []


def test_what_fits_in_the_reserve_always_fits() -> None:
    engine = DrivenEngine(window=256, reserve_tokens=64)
    for n in range(100):
        engine.observe(reading(n))
        engine.settle()
        sink, _ = engine.ask("x" * 60, max_tokens=1)
        engine.settle()
        assert reason(sink) is FinishReason.LENGTH


@pytest.mark.parametrize("budget_s", [0.05, 0.3, 0.5, 0.777, 1.0, 2.0])
def test_an_ask_is_refused_at_once_or_answered_in_time(budget_s: float) -> None:
    engine = costly(chunk_tokens=8)
    sink = Sink()
    try:
        sink, _ = engine.ask("what is it like?", budget_s, images=(image(),), max_tokens=1000)
    except Overloaded as refusal:
        assert refusal.needed_s is not None and refusal.needed_s > budget_s
        return
    engine.settle()
    assert engine.clock() - 1000.0 <= budget_s
    assert reason(sink) is FinishReason.BUDGET


def test_once_it_speaks_an_ask_ends_by_its_deadline_and_not_a_step_before() -> None:
    engine = costly()
    sink, _ = engine.ask(budget_s=1.0, max_tokens=1000)
    engine.settle()
    assert reason(sink) is FinishReason.BUDGET
    assert isinstance(sink.end, Done)
    assert 1.0 - 2 * STEP_S < sink.end.timings.total_s <= 1.0


def test_no_unit_is_started_after_the_deadline() -> None:
    engine = costly()
    sink, _ = engine.ask(budget_s=0.5)
    engine.clock.now_s += 0.5
    before_s = engine.clock()
    engine.settle()
    assert isinstance(error(sink), DeadlineExceeded)
    assert engine.clock() == before_s


def test_an_ask_that_expires_in_the_queue_fails_while_another_still_runs() -> None:
    engine = costly()
    long, _ = engine.ask(budget_s=10.0, max_tokens=40)
    engine.turns_until(lambda: bool(long.text))
    arrived_s = engine.clock()
    late, _ = engine.ask(budget_s=3.0)
    engine.clock.costs_s["step"] = 3.0
    engine.turns_until(lambda: late.end is not None)
    assert isinstance(error(late), DeadlineExceeded)
    assert "in the queue" in str(error(late))
    assert long.end is None
    assert engine.clock() <= arrived_s + 3.0 + 3.0
    engine.clock.costs_s["step"] = STEP_S
    engine.settle()
    assert reason(long) is FinishReason.LENGTH


def test_the_earliest_deadline_goes_first() -> None:
    engine = DrivenEngine()
    order: list[str] = []
    for name, budget_s in (("a", 30.0), ("b", 10.0), ("c", 20.0), ("d", 10.0)):
        now_s = engine.clock()

        def sink(event: object, name: str = name) -> None:
            if isinstance(event, Done):
                order.append(name)

        engine.submit(Ask(name, now_s, now_s + budget_s), sink)
    engine.settle()
    assert order == ["b", "d", "c", "a"]


def test_a_ticket_tells_how_many_asks_are_in_front() -> None:
    engine = DrivenEngine()
    running, _ = engine.ask(budget_s=100)
    engine.turn()
    _, second = engine.ask(budget_s=100)
    _, urgent = engine.ask(budget_s=1)
    assert running.end is None
    assert second.accepted.queue_position == 1
    assert urgent.accepted.queue_position == 1
    assert second.request_id != urgent.request_id
    assert engine.status().queue_depth == 3


def test_a_cancelled_answer_stops_within_one_step() -> None:
    engine = DrivenEngine()
    steps: list[str] = []
    sink, ticket = engine.ask(max_tokens=1000)
    engine.turns_until(lambda: len(sink.text) == 5)
    engine.model.on_run = lambda what, n_tokens: steps.append(what)
    ticket.cancel()
    engine.settle()
    assert steps == []
    assert reason(sink) is FinishReason.CANCELLED
    assert len(sink.text) == 5
    ticket.cancel()
    engine.settle()
    assert len([event for event in sink if isinstance(event, Done)]) == 1


def test_a_cancelled_ask_in_the_queue_costs_nothing() -> None:
    engine = DrivenEngine()
    first, _ = engine.ask(max_tokens=50)
    engine.turn()
    second, ticket = engine.ask()
    ticket.cancel()
    engine.turn()
    assert reason(second) is FinishReason.CANCELLED
    assert first.end is None
    assert isinstance(second.end, Done)
    assert second.end.usage.prompt_tokens == 0


def test_a_full_queue_refuses_with_the_time_to_try_again() -> None:
    engine = costly(queue=2)
    engine.answer(max_tokens=20)
    engine.ask()
    engine.turn()
    engine.ask()
    engine.ask()
    with pytest.raises(Overloaded) as caught:
        engine.ask()
    assert 0 < caught.value.retry_after_s < 2
    assert engine.status().counters["asks_rejected"] == 1


def test_images_need_a_model_that_sees() -> None:
    with pytest.raises(InvalidInput, match="no vision"):
        DrivenEngine(FakeModel(vision=False)).ask(images=(image(),))


def test_an_unknown_camera_is_not_found_and_the_known_ones_are_named() -> None:
    engine = DrivenEngine()
    engine.observe(frame(1, "door"))
    with pytest.raises(NotFound, match="door"):
        engine.ask(camera="garden")
    assert engine.cameras() == ["door"]


def test_a_camera_forgotten_in_the_meantime_is_not_found() -> None:
    engine = DrivenEngine()
    engine.observe(frame(0, "door"))
    sink, _ = engine.ask(camera="door")
    for n in range(MAX_CAMERAS):
        engine.observe(frame(n, f"camera{n}"))
    engine.settle()
    assert isinstance(error(sink), NotFound)


def test_every_camera_that_can_wait_can_be_asked_about() -> None:
    engine = DrivenEngine(window=4096)
    for n in range(MAX_CAMERAS):
        engine.observe(frame(n, f"camera{n}"))
    assert all(engine.answer(camera=f"camera{n}") for n in (0, MAX_CAMERAS - 1))


def test_a_frame_asked_about_twice_is_encoded_once() -> None:
    engine = DrivenEngine()
    encoded: list[int] = []
    engine.model.on_run = lambda what, n_tokens: encoded.append(n_tokens) if what == "encode" else None
    engine.observe(frame(1))
    first, _ = engine.ask(camera="door")
    engine.turns_until(lambda: first.end is not None)
    assert encoded == [16]
    assert engine.answer(camera="door") != ""
    assert engine.answer("another?", camera="door") != ""
    assert encoded == [16]
    assert engine.live.text.count("#") == 16


def test_the_newest_frame_of_a_camera_is_the_one_that_is_asked_about() -> None:
    old, new = DrivenEngine(), DrivenEngine()
    old.observe(frame(1))
    for n in (1, 2):
        new.observe(frame(n))
    assert old.answer(camera="door", use_context=False) != new.answer(camera="door", use_context=False)


def test_the_camera_comes_before_the_images_and_they_before_the_question() -> None:
    engine = DrivenEngine()
    engine.observe(frame(1, height=2, width=4))
    engine.answer("how?", camera="door", images=(image(height=4, width=2), image(height=6, width=2)), use_context=False)
    text = engine.fork.text
    assert text.startswith(f"<system>{SYSTEM}<end><user>[")
    assert "camera door: <image>##</image>\n<image>##</image>\n<image>###</image>\nhow?<close>" in text


def test_images_of_an_ask_are_shrunk_to_the_room_there_is() -> None:
    engine = DrivenEngine(window=256, reserve_tokens=256)
    sink, _ = engine.ask(images=(image(height=400, width=400), image(height=300, width=100)))
    engine.settle()
    assert isinstance(sink.end, Done)
    assert 64 < sink.end.usage.image_tokens <= 128


def flooded(budget_s: float, n_asks: int, *, others: int = 3) -> tuple[DrivenEngine, float]:
    """An engine with much to read and always some asks waiting, after so many answers; with the time reading took."""
    engine = costly(window=8192, chunk_tokens=8, backlog=10_000)
    for n in range(2000):
        engine.observe(reading(n))
    reading_s = 0.0
    sinks: list[Sink] = []
    while n_asks:
        while len(sinks) <= others:
            try:
                sinks.append(engine.ask("q" * 40, budget_s, max_tokens=40)[0])
            except Overloaded:
                break
        before_s, forks = engine.clock(), engine.status().counters["context_tokens_read"]
        engine.turn()
        if engine.status().counters["context_tokens_read"] > forks:
            reading_s += engine.clock() - before_s
        ended = [sink for sink in sinks if sink.end is not None]
        for sink in ended:
            sinks.remove(sink)
            n_asks -= 1
    return engine, reading_s


def test_reading_gets_its_share_of_the_time_while_asks_wait() -> None:
    engine, reading_s = flooded(budget_s=60.0, n_asks=40)
    total_s = engine.clock() - 1000.0
    chunk_s = 8 * PREFILL_S
    running_s = 2.0  # the ask that has not ended yet
    assert READING_SHARE * (total_s - reading_s - running_s) <= reading_s + 2 * chunk_s
    assert reading_s <= READING_SHARE * (total_s - reading_s) + 40 * chunk_s
    assert engine.status().counters["asks_expired"] == 0


def test_reading_goes_on_under_a_flood_of_urgent_asks() -> None:
    """None of them has time to spare; reading is owed its time, and asks are refused once that is too much."""
    engine, reading_s = flooded(budget_s=0.9, n_asks=200)
    total_s = engine.clock() - 1000.0
    assert reading_s >= READING_SHARE * (total_s - reading_s) - 2 * MOST_OWED_S
    assert reading_s > 0


def test_reading_takes_no_more_than_its_share_of_what_the_next_ask_has_left() -> None:
    engine = costly(chunk_tokens=8, window=8192, backlog=2000)
    for n in range(500):
        engine.observe(reading(n))
    long, _ = engine.ask(budget_s=1000.0, max_tokens=1000, use_context=False)
    engine.turns_until(lambda: long.end is not None)
    ended_s = engine.clock()
    soon, _ = engine.ask(budget_s=4.0)
    engine.turns_until(lambda: bool(soon.text))
    assert isinstance(long.end, Done) and long.end.timings.total_s > 10.0
    assert 0.8 <= engine.clock() - ended_s <= 4.0 * READING_SHARE + 1.0


def test_an_ask_that_comes_while_reading_has_its_share_is_in_time() -> None:
    engine = costly(chunk_tokens=8, window=8192, backlog=2000)
    for n in range(500):
        engine.observe(reading(n))
    long, _ = engine.ask(budget_s=1000.0, max_tokens=100, use_context=False)
    patient, _ = engine.ask(budget_s=1000.0)
    engine.turns_until(lambda: long.end is not None)
    engine.turn()
    urgent, _ = engine.ask(budget_s=0.8)
    engine.turns_until(lambda: urgent.end is not None)
    assert reason(urgent) is FinishReason.LENGTH
    assert patient.text == ""


@pytest.mark.parametrize(("what", "unit"), [("encode", "image"), ("prefill", "prefill"), ("place", "prefill")])
def test_an_ask_that_fails_without_a_word_leaves_a_line_of_where_the_time_went(
    what: str, unit: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = DrivenEngine()
    engine.clock.costs_s = {what: 5.0}
    sink, ticket = engine.ask("a secret?", budget_s=3.0, images=(image(),))
    engine.clock.now_s += 1.0
    with caplog.at_level(logging.INFO, "iotd.engine"):
        engine.settle()
    assert isinstance(error(sink), DeadlineExceeded)
    (line,) = [record.message for record in caplog.records]
    assert line.startswith(f"{ticket.request_id} had no word by its deadline: queue 1.00 s, image ")
    assert line.endswith(f"last unit {unit}, begun 2.00 s before the deadline")
    assert "secret" not in line


def test_an_ask_that_fails_in_the_queue_says_so(caplog: pytest.LogCaptureFixture) -> None:
    engine = DrivenEngine()
    engine.ask(budget_s=0.5)
    engine.clock.now_s += 1.0
    with caplog.at_level(logging.INFO, "iotd.engine"):
        engine.settle()
    assert caplog.messages[0].endswith("all 0.50 s in the queue")


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("kind", [Delta, Done])
def test_a_broken_sink_harms_only_its_own_ask(kind: type, caplog: pytest.LogCaptureFixture) -> None:
    engine = DrivenEngine()
    seen: list[object] = []

    def sink(event: object) -> None:
        seen.append(event)
        if isinstance(event, kind):
            raise BrokenError

    now_s = engine.clock()
    engine.submit(Ask("how?", now_s, now_s + 10), sink)
    other, _ = engine.ask()
    engine.settle()
    assert reason(other) is FinishReason.LENGTH
    assert "BrokenError" in caplog.text
    if kind is Delta:
        assert [type(event) for event in seen] == [Delta, Done]
        assert isinstance(seen[-1], Done)
        assert seen[-1].finish_reason is FinishReason.CANCELLED


@pytest.mark.parametrize("where", ["prefill", "encode", "place", "step"])
def test_a_defect_while_answering_fails_that_ask_alone(where: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = DrivenEngine()
    expected = engine.answer()

    def on_run(what: str, n_tokens: int) -> None:
        if what == where:
            raise BrokenError("secret of the inside")

    engine.model.on_run = on_run
    sink, _ = engine.ask(images=(image(),))
    with caplog.at_level(logging.ERROR):
        engine.settle()
    engine.model.on_run = FakeModel.silent
    assert isinstance(error(sink), Internal)
    assert "secret" not in str(error(sink))
    assert "secret of the inside" in caplog.text
    assert engine.answer() == expected
    assert engine.status().counters["defects"] == 1


def test_asks_are_refused_before_the_start() -> None:
    engine = DrivenEngine(opened=False)
    with pytest.raises(Unavailable, match="loading"):
        engine.ask()
    assert not engine.status().ready


def test_every_end_is_counted() -> None:
    engine = costly()
    engine.answer()
    late, _ = engine.ask(budget_s=1.0)
    engine.clock.now_s += 1.0
    engine.settle()
    _, ticket = engine.ask()
    ticket.cancel()
    engine.ask(budget_s=1.0, max_tokens=100)
    with pytest.raises(Overloaded):
        engine.ask(budget_s=0.1)
    engine.settle()
    counters = engine.status().counters
    assert isinstance(error(late), DeadlineExceeded)
    ends = {name: counters[name] for name in counters if name.startswith("asks_") and counters[name]}
    assert ends == {"asks_length": 1, "asks_expired": 1, "asks_cancelled": 1, "asks_refused": 1, "asks_budget": 1}
    assert counters["asks"] == 4


def test_a_new_queue_length_holds_for_the_asks_that_come_after() -> None:
    engine = DrivenEngine(queue=1)
    engine.ask()
    with pytest.raises(Overloaded):
        engine.ask()
    engine.reconfigure(AskConfig(queue=2))
    engine.ask()
    with pytest.raises(Overloaded):
        engine.ask()


def test_an_answer_is_gone_when_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the garbage collector's help: with a large vocabulary each would keep a megabyte of logits."""
    made: list[weakref.ref[Answer]] = []

    class Watched(Answer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(weakref.ref(self))

    monkeypatch.setattr("iotd.engine.worker.Answer", Watched)
    engine = DrivenEngine()
    gc.disable()
    try:
        engine.answer()
        cut, ticket = engine.ask(max_tokens=100)
        engine.turns_until(lambda: bool(cut.text))
        ticket.cancel()
        engine.settle()
        assert [answer() for answer in made] == [None, None]
    finally:
        gc.enable()
