"""Waits grow to a limit, differ between clients, and are short again after success."""

import random

from hypothesis import given
from hypothesis import strategies as st

from iotd.mqtt.backoff import Backoff


@given(st.integers(0, 2**32), st.integers(1, 200))
def test_each_wait_lies_in_the_upper_half_of_a_doubling_ceiling(seed: int, n_failures: int) -> None:
    backoff = Backoff(0.5, 60.0, random.Random(seed))
    waits = [backoff.next_s() for _ in range(n_failures)]
    ceilings = [min(60.0, 0.5 * 2**i) for i in range(n_failures)]
    assert all(ceiling / 2 <= wait <= ceiling for wait, ceiling in zip(waits, ceilings, strict=True))


def test_two_clients_do_not_come_back_together() -> None:
    first, second = Backoff(0.5, 60.0, random.Random(1)), Backoff(0.5, 60.0, random.Random(2))
    assert [first.next_s() for _ in range(5)] != [second.next_s() for _ in range(5)]


def test_success_makes_the_wait_short_again() -> None:
    backoff = Backoff(0.5, 60.0)
    for _ in range(10):
        backoff.next_s()
    assert backoff.slow_s() >= 30
    backoff.reset()
    assert backoff.next_s() <= 0.5
