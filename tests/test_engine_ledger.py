"""Exact figures are those of the readings, whatever their order, in a fixed memory."""

import random

import pytest
from engine_driver import NOON_S, DrivenEngine
from hypothesis import given
from hypothesis import strategies as st

from iotd.counters import Counters
from iotd.engine.engine import COUNTS
from iotd.engine.ledger import BUCKET_S, N_BUCKETS, Figures, Ledger, describe
from iotd.events import Reading

DAY_S = BUCKET_S * N_BUCKETS


def ledger(max_sensors: int = 8) -> tuple[Ledger, Counters]:
    counters = Counters(COUNTS)
    return Ledger(counters, max_sensors), counters


def figures(book: Ledger, source: str) -> Figures:
    (found,) = book.find("", [source], 9)
    return found


@given(st.lists(st.tuples(st.integers(0, 3 * round(DAY_S)), st.integers(-500, 500)), min_size=1, max_size=80))
def test_the_figures_are_those_of_the_readings_of_the_last_day(readings: list[tuple[int, int]]) -> None:
    """To a bucket: what is older than a day by less than one may count or not."""
    book, _ = ledger()
    for after_s, tenths in readings:
        book.hear(Reading("hall", f"{tenths / 10:.1f} °C", NOON_S + after_s))
    found = figures(book, "hall")
    newest_s = max(after_s for after_s, _ in readings)
    newest = [tenths for after_s, tenths in readings if after_s == newest_s][-1]
    last = int((NOON_S + newest_s) // BUCKET_S)
    values = [tenths / 10 for after_s, tenths in readings if int((NOON_S + after_s) // BUCKET_S) > last - N_BUCKETS]
    assert (found.text, found.time_s) == (f"{newest / 10:.1f} °C", NOON_S + newest_s)
    assert (found.lowest, found.highest) == (min(values), max(values))
    assert found.mean == pytest.approx(sum(values) / len(values))


@given(st.integers(-50, 50), st.integers(-20, 20))
def test_a_steady_change_is_the_trend(begin: int, per_hour: int) -> None:
    book, _ = ledger()
    for minute in range(0, 120, 2):
        book.hear(Reading("hall", f"{begin + per_hour * minute / 60:.4f} °C", NOON_S + 60 * minute))
    assert figures(book, "hall").per_hour == pytest.approx(per_hour, abs=0.01)


def test_too_little_is_no_trend() -> None:
    book, _ = ledger()
    book.hear(Reading("hall", "20 °C", NOON_S))
    book.hear(Reading("hall", "25 °C", NOON_S + BUCKET_S))
    assert figures(book, "hall").per_hour is None


def test_words_have_a_newest_value_and_no_extremes() -> None:
    book, _ = ledger()
    for n, state in enumerate(("open", "closed")):
        book.hear(Reading("back door", state, NOON_S + n))
    found = figures(book, "back door")
    assert (found.text, found.lowest, found.mean) == ("closed", None, None)
    assert describe(found, "[12:00:01]") == "exact back door: closed [12:00:01]\n"


def test_a_line_says_it_in_plain_words() -> None:
    book, _ = ledger()
    for n in range(7):
        book.hear(Reading("hall", f"{20 + n} °C", NOON_S + n * BUCKET_S))
    line = describe(figures(book, "hall"), "[13:00:00]")
    assert line == "exact hall: 26 °C [13:00:00]; in 24 hours 20 to 26 °C, on average 23 °C; +6 °C in an hour\n"


def test_a_late_reading_is_not_the_newest() -> None:
    book, _ = ledger()
    book.hear(Reading("hall", "20 °C", NOON_S + 100))
    book.hear(Reading("hall", "30 °C", NOON_S))
    assert (figures(book, "hall").text, figures(book, "hall").highest) == ("20 °C", 30.0)


def test_the_sensor_silent_for_longest_is_forgotten_with_all_its_figures() -> None:
    book, counters = ledger(max_sensors=2)
    for source, value in (("a", 1), ("b", 2), ("a", 3), ("c", 4)):
        book.hear(Reading(source, str(value), NOON_S))
    assert [found.source for found in book.find("", ["*"], 9)] == ["a", "c"]
    assert figures(book, "c").lowest == 4
    assert counters.snapshot()["forgotten_sensors"] == 1


@pytest.mark.parametrize(
    ("question", "patterns", "wanted"),
    [
        ("How warm is the kitchen?", (), ["kitchen humidity", "kitchen temperature"]),
        ("What is the kitchen temperature?", (), ["kitchen temperature"]),
        ("Compare all temperatures!", (), ["hall temperature", "kitchen temperature"]),
        ("Is anybody there?", (), []),
        ("", ("*temperature",), ["hall temperature", "kitchen temperature"]),
        ("", ("hall*", "kitchen humidity"), ["hall temperature", "kitchen humidity"]),
    ],
)
def test_the_sensors_that_a_question_concerns(question: str, patterns: tuple[str, ...], wanted: list[str]) -> None:
    book, _ = ledger()
    for source in ("kitchen temperature", "kitchen humidity", "hall temperature"):
        book.hear(Reading(source, "20", NOON_S))
    assert [found.source for found in book.find(question, patterns, 9)] == wanted


def test_any_text_of_a_sensor_is_taken() -> None:
    book, _ = ledger()
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choices("0123456789.-+e °C\n日nan", k=rng.randrange(400)))
        book.hear(Reading("odd", text, NOON_S))
        assert figures(book, "odd").text == text


def test_exact_figures_stand_before_the_question_even_of_what_was_skipped() -> None:
    engine = DrivenEngine(window=512, backlog=2)
    for n in range(50):
        engine.observe(Reading("hall temperature", f"{n} °C", NOON_S + n))
    engine.observe(Reading("door", "open", NOON_S + 60))
    engine.settle()
    engine.answer("How warm is the hall?", exact_readings=True)
    prompt = engine.fork.text.partition("skipped")[2]
    assert "exact hall temperature: 49 °C" in prompt
    assert "in 24 hours 0 to 49 °C" in prompt
    assert "exact door" not in prompt
    assert prompt.index("exact hall") < prompt.index("How warm")


def test_figures_that_do_not_fit_are_left_out() -> None:
    engine = DrivenEngine(window=256, reserve_tokens=64)
    for n in range(40):
        engine.observe(Reading(f"room{n} temperature", f"{n} °C", NOON_S + n))
        engine.settle()
    assert engine.answer("temperatures?", exact_readings=True, max_tokens=1)
    assert engine.fork.text.count("exact room") <= 2
