"""Counts: every one there from the start, none by accident."""

import pytest

from iotd.counters import Counters


def test_every_count_shows_from_the_start_and_a_snapshot_stays_as_it_was() -> None:
    counters = Counters(["a", "b"])
    before = counters.snapshot()
    counters.add("a", 3)
    assert before == {"a": 0, "b": 0}
    assert counters.snapshot() == {"a": 3, "b": 0}


def test_a_misspelt_name_makes_no_new_series() -> None:
    with pytest.raises(KeyError):
        Counters(["frames"]).add("frame")
