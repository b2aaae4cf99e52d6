"""A run of reading takes no longer than a question may wait, whatever a token costs, and not less than it could."""

import random

import pytest
from engine_driver import DrivenEngine, ManualClock, reading

from iotd.engine.pace import SEEN, Pace

LIMIT_S = 0.05


def work(pace: Pace, clock: ManualClock, base_s: float, token_s: float, runs: int) -> list[float]:
    """Seconds of so many full runs, at a fixed cost and one for each token."""
    took: list[float] = []
    for _ in range(runs):
        began_s, n_tokens = clock(), pace.size
        with pace.run(n_tokens):
            clock.now_s += base_s + token_s * n_tokens
        took.append(clock() - began_s)
    return took


@pytest.mark.parametrize(("base_s", "token_s"), [(0.0, 0.001), (0.03, 0.004), (0.002, 0.0001), (0.03, 0.011), (0.2, 0)])
def test_runs_come_to_fit_and_to_use_what_is_allowed(base_s: float, token_s: float) -> None:
    clock = ManualClock()
    pace = Pace(32, LIMIT_S, clock)
    work(pace, clock, base_s, token_s, 12 * SEEN)
    took = work(pace, clock, base_s, token_s, 20)
    assert max(took) <= LIMIT_S or pace.size == 1
    assert base_s + token_s * (2 * pace.size + 1) > 0.75 * LIMIT_S or pace.size == 32


def test_the_first_run_that_takes_far_too_long_is_enough() -> None:
    clock = ManualClock()
    pace = Pace(32, LIMIT_S, clock)
    work(pace, clock, 0.03, 0.011, 1)
    assert 1 <= pace.size <= 4


def test_one_stall_changes_nothing_and_a_slower_clock_does() -> None:
    clock = ManualClock()
    pace = Pace(32, LIMIT_S, clock)
    work(pace, clock, 0.0, 0.004, 10 * SEEN)
    size = pace.size
    work(pace, clock, 1.0, 0.004, 1)
    work(pace, clock, 0.0, 0.004, 2 * SEEN)
    assert pace.size == size
    work(pace, clock, 0.0, 0.012, 2 * SEEN)
    assert pace.size <= size // 2
    work(pace, clock, 0.0, 0.004, 8 * SEEN)
    assert pace.size >= size - 2


def test_short_runs_do_not_make_a_size_look_cheap() -> None:
    clock = ManualClock()
    pace = Pace(32, LIMIT_S, clock)
    work(pace, clock, 0.0, 0.004, 10 * SEEN)
    size = pace.size
    for _ in range(100):
        with pace.run(2):
            clock.now_s += 0.008
    assert pace.size == size


def test_no_unit_of_the_engines_reading_keeps_a_question_waiting_longer() -> None:
    rng = random.Random(1)
    engine = DrivenEngine(window=1024, chunk_tokens=64, chunk_s=LIMIT_S)
    engine.clock.costs_s = {"prefill": 0.006}
    for n in range(40):
        engine.observe(reading(n, "x" * rng.randrange(60)))
    engine.turns_until(lambda: engine._context._pace.size < 9)
    waits: list[float] = []
    began_s = engine.clock()
    while engine.turn():
        waits.append(engine.clock() - began_s)
        began_s = engine.clock()
    assert len(waits) > 100
    assert max(waits) <= LIMIT_S
