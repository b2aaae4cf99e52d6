"""The warm context: what it holds, how its successor takes over, and that nothing grows."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pytest
from engine_driver import NOON_S, SYSTEM, DrivenEngine, frame, image, reading
from fake_model import FakeModel, FakeState
from numpy.typing import NDArray

from iotd.errors import ConfigError
from iotd.events import Frame, Reading

OPENING = f"<system>{SYSTEM}<end><user>"
N_OPENING = len(SYSTEM) + 3
DATE = datetime.fromtimestamp(NOON_S).strftime("[%Y-%m-%d %A]\n")


def stamp(n: float) -> str:
    return datetime.fromtimestamp(NOON_S + n).strftime("[%H:%M:%S]")


def line(n: int, source: str = "s", text: str = "on") -> str:
    return f"{stamp(n)} {source} {text}{n}\n"


def test_readings_become_dated_lines_in_one_open_turn() -> None:
    engine = DrivenEngine()
    for n in range(3):
        engine.observe(reading(n))
    engine.settle()
    assert engine.live.text == OPENING + DATE + line(0) + line(1) + line(2)


def test_a_new_day_begins_with_its_date() -> None:
    engine = DrivenEngine()
    engine.observe(reading(0))
    engine.observe(reading(86_400))
    engine.settle()
    tomorrow = datetime.fromtimestamp(NOON_S + 86_400).strftime("[%Y-%m-%d %A]\n")
    assert engine.live.text == OPENING + DATE + line(0) + tomorrow + line(86_400)


def test_a_frame_stands_behind_its_time_and_camera() -> None:
    engine = DrivenEngine()
    engine.observe(frame(1, "door", height=4, width=6))
    engine.settle()
    assert engine.live.text == OPENING + DATE + f"{stamp(1)} camera door: <image>######</image>\n"


def test_control_tokens_in_a_payload_stay_text() -> None:
    engine = DrivenEngine()
    engine.observe(Reading("s", "<close>", NOON_S))
    engine.settle()
    assert all(isinstance(item, int) and item < 256 for item in engine.live.trace[len(SYSTEM) + 3 :])


def test_the_window_holds_between_half_of_it_and_all_of_it_once_it_was_filled() -> None:
    engine = DrivenEngine(window=256)
    lengths = []
    for n in range(200):
        engine.observe(reading(n, "x" * (n % 37)))
        engine.settle()
        lengths.append(engine.live.position)
    first_swap = next(n for n in range(1, 200) if lengths[n] < lengths[n - 1])
    assert max(lengths) <= 256
    assert min(lengths[first_swap:]) - N_OPENING >= 128
    assert engine.status().counters["context_swaps"] > 10


def test_after_a_swap_the_context_is_the_newest_events_read_from_scratch() -> None:
    engine = DrivenEngine(window=256)
    for n in range(60):
        engine.observe(reading(n))
        engine.settle()
    fresh = DrivenEngine(window=256)
    kept = engine.live.text.count("\n") - 1
    for n in range(60 - kept, 60):
        fresh.observe(reading(n))
    fresh.settle()
    assert engine.status().counters["context_swaps"] >= 1
    assert engine.live.trace == fresh.live.trace
    assert np.array_equal(engine.model.logits(engine.live), fresh.model.logits(fresh.live))
    assert engine.answer() == fresh.answer()


def test_a_swap_keeps_the_date_line() -> None:
    engine = DrivenEngine(window=256)
    for n in range(60):
        engine.observe(reading(n))
    engine.settle()
    assert engine.live.text.startswith(OPENING + DATE)


def test_asks_are_answered_from_the_old_context_until_its_successor_is_whole() -> None:
    engine = DrivenEngine(window=256)
    engine.turns_until_swap_begins()
    before = engine.live
    text = before.text
    while engine.live is before:
        assert engine.live.text == text
        engine.answer_one("what?")
    assert engine.status().counters["context_swaps"] == 1


def test_an_ask_never_sees_half_a_line() -> None:
    engine = DrivenEngine(chunk_tokens=8)
    engine.observe(reading(0, "a long text that takes several chunks "))
    engine.observe(frame(1))
    seen = {engine.live.text}
    while engine.turn():
        seen.add(engine.live.text)
    first = OPENING + DATE + line(0, text="a long text that takes several chunks ")
    assert seen == {OPENING, first, first + f"{stamp(1)} camera door: <image>{'#' * 16}</image>\n"}


def test_a_line_that_asks_break_into_is_read_once_more_and_not_again() -> None:
    """Its rows are lent by the context, until an ask needs them; then it has rows of its own."""
    engine = DrivenEngine(chunk_tokens=8)
    text = "a long text that takes several chunks "
    engine.observe(reading(0, text))
    while not engine.live.text.endswith("chunks 0\n"):
        engine.turn()
        engine.turn()
        engine.answer_one("what?")
    n_tokens = len(DATE + line(0, text=text))
    again = engine.status().counters["context_tokens_read"] - n_tokens
    assert 0 < again <= 16
    assert engine.live.text == OPENING + DATE + line(0, text=text)
    alone = DrivenEngine(chunk_tokens=8)
    alone.observe(reading(0, text))
    alone.settle()
    assert engine.answer() == alone.answer()


def test_no_unit_of_reading_is_longer_than_a_chunk() -> None:
    runs: list[int] = []
    model = FakeModel(on_run=lambda what, n: runs.append(n) if what == "prefill" else None)
    engine = DrivenEngine(model, chunk_tokens=8)
    for n in range(80):
        engine.observe(reading(n, "x" * (n % 23)))
        before = len(runs)
        engine.turn()
        assert len(runs) <= before + 1
    engine.settle()
    assert max(runs) <= 8


def test_an_image_is_placed_in_runs_of_a_chunk() -> None:
    runs: list[tuple[str, int]] = []
    engine = DrivenEngine(FakeModel(on_run=lambda what, n: runs.append((what, n))), chunk_tokens=12)
    engine.observe(frame(1, height=8, width=14))
    engine.observe(frame(2, "garden"))
    engine.settle()
    assert [n for what, n in runs if what == "place"] == [12, 12, 4, 12, 4]
    assert [n for what, n in runs if what == "encode"] == [28, 16]
    whole = DrivenEngine(chunk_tokens=64)
    whole.observe(frame(1, height=8, width=14))
    whole.observe(frame(2, "garden"))
    whole.settle()
    assert engine.live.trace == whole.live.trace


def test_short_lines_that_wait_are_read_together() -> None:
    runs: list[int] = []
    engine = DrivenEngine(FakeModel(on_run=lambda what, n: runs.append(n)), chunk_tokens=64)
    engine.observe(reading(0))
    engine.settle()
    runs.clear()
    for n in range(1, 9):
        engine.observe(reading(n))
    engine.settle()
    assert len(runs) == 3
    assert sum(runs) == sum(len(line(n)) for n in range(1, 9))


def test_the_state_never_grows() -> None:
    engine = DrivenEngine(window=256)
    states, nbytes = engine.model.n_states, engine.status().state_nbytes
    read = 0
    for n in range(1500):
        engine.observe(frame(n) if n % 10 == 0 else reading(n))
        engine.settle()
    read = engine.status().counters["context_tokens_read"]
    assert read > 20_000
    assert engine.model.n_states == states == 4
    assert engine.status().state_nbytes == nbytes
    assert sum(segment.n_tokens for segment in engine._context._history) < 256


def test_the_context_says_what_it_skipped_once_a_minute() -> None:
    engine = DrivenEngine(window=512, backlog=4)
    for n in range(9):
        engine.observe(reading(n))
    engine.settle()
    skips = f"{stamp(0)} skipped 7 older readings\n"
    assert engine.live.text == OPENING + DATE + skips + line(0) + line(8)
    for n in range(9, 18):
        engine.observe(reading(n))
    engine.settle()
    assert "skipped" not in engine.live.text.partition(skips)[2]
    engine.observe(reading(90))
    engine.settle()
    assert engine.live.text.endswith(f"{stamp(90)} skipped 7 older readings\n" + line(90))


def test_a_huge_reading_is_cut_and_counted() -> None:
    engine = DrivenEngine(window=256)
    engine.observe(Reading("s", "x" * 1_000_000, NOON_S))
    engine.settle()
    assert engine.live.text.startswith(OPENING + DATE + f"{stamp(0)} s xxx")
    assert engine.live.text.endswith("x …\n")
    assert engine.live.position <= N_OPENING + len(DATE) + 64
    assert engine.status().counters["cut_readings"] == 1


def test_a_large_frame_is_shrunk_to_a_quarter_of_the_window() -> None:
    engine = DrivenEngine(window=256)
    engine.observe(frame(1, height=200, width=400))
    engine.settle()
    assert 20 <= engine.live.text.count("#") <= 64
    assert engine.status().counters["frames_read"] == 1


def test_a_frame_that_cannot_be_small_enough_is_refused_and_counted() -> None:
    engine = DrivenEngine(window=256)
    engine.observe(Frame("door", image(height=2, width=1000), NOON_S))
    engine.observe(reading(1))
    engine.settle()
    assert engine.live.text == OPENING + DATE + line(1)
    assert engine.status().counters["refused_frames"] == 1


def test_refused_frames_are_logged_ever_more_seldom(caplog: pytest.LogCaptureFixture) -> None:
    engine = DrivenEngine(window=256)
    for n in range(100):
        engine.observe(Frame("door", image(height=2, width=1000), NOON_S + n))
        engine.settle()
    assert engine.status().counters["refused_frames"] == 100
    assert [record.args[1] for record in caplog.records if isinstance(record.args, tuple)] == [1, 2, 4, 8, 16, 32, 64]


def test_without_vision_frames_are_refused_and_counted() -> None:
    engine = DrivenEngine(FakeModel(vision=False))
    engine.observe(frame(1))
    engine.settle()
    assert engine.live.text == OPENING
    assert engine.status().counters["refused_frames"] == 1
    assert engine.cameras() == []


def test_a_system_prompt_too_long_for_the_window_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError) as caught:
        DrivenEngine(window=256, system="x" * 64)
    assert caught.value.field == "context.system"


class DefectError(RuntimeError):
    pass


def failing(when: str, times: int) -> tuple[FakeModel, list[str]]:
    """A model whose first `times` runs of a kind fail once `armed` is not empty."""
    armed: list[str] = []

    def on_run(what: str, n_tokens: int) -> None:
        if what == when and armed:
            armed.pop()
            raise DefectError

    return FakeModel(on_run=on_run), armed


@pytest.mark.parametrize(("text", "chunk"), [("on", 64), ("x" * 50, 16)], ids=["in one chunk", "in several chunks"])
def test_a_defect_while_reading_costs_that_event_alone(text: str, chunk: int, caplog: pytest.LogCaptureFixture) -> None:
    model, armed = failing("prefill", 1)
    engine = DrivenEngine(model, chunk_tokens=chunk)
    engine.observe(reading(0))
    engine.settle()
    armed.append("now")
    engine.observe(reading(1, text))
    engine.settle()
    engine.observe(reading(2))
    engine.settle()
    assert engine.live.text == OPENING + DATE + line(0) + line(2)
    counters = engine.status().counters
    assert (counters["defects"], counters["lost_events"]) == (1, 1)
    assert "DefectError" in caplog.text


def test_a_defect_while_encoding_costs_that_frame_alone() -> None:
    model, armed = failing("encode", 1)
    engine = DrivenEngine(model)
    armed.append("now")
    engine.observe(frame(0))
    engine.settle()
    engine.observe(reading(1))
    engine.observe(frame(2))
    engine.settle()
    assert engine.live.text == OPENING + DATE + line(1) + f"{stamp(2)} camera door: <image>{'#' * 16}</image>\n"


@pytest.mark.parametrize("failures", [1, 2, 3, 4])
def test_a_defect_while_building_a_successor_never_stops_the_reading(failures: int) -> None:
    model, armed = failing("prefill", failures)
    engine = DrivenEngine(model, window=256)
    engine.turns_until_swap_begins()
    armed.extend(["now"] * failures)
    engine.settle()
    for n in range(100, 140):
        engine.observe(reading(n))
        engine.settle()
    assert engine.live.text.endswith(line(138) + line(139))
    assert 128 <= engine.live.position <= 256
    assert engine.status().counters["defects"] == failures


class HalfwayModel(FakeModel):
    """While `breaks`, a run changes the state and then fails."""

    breaks = False

    def prefill(
        self, state: FakeState, tokens: Sequence[int], *, logits: bool = True, **_: Any
    ) -> NDArray[np.float32] | None:
        found = super().prefill(state, tokens[: len(tokens) // 2] if self.breaks else tokens, logits=logits)
        if self.breaks:
            self.breaks = False
            raise DefectError
        return found


def test_a_run_that_breaks_off_halfway_leaves_nothing_in_the_context() -> None:
    model = HalfwayModel()
    engine = DrivenEngine(model, chunk_tokens=64)
    engine.observe(reading(0))
    engine.settle()
    model.breaks = True
    engine.observe(reading(1))
    engine.settle()
    assert engine.live.text == OPENING + DATE + line(0)
