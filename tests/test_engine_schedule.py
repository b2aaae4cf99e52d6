"""Earliest deadline first: room for one more is where nobody becomes late by it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iotd.engine.schedule import Slot, gap, latest_start

SLOTS = st.lists(st.builds(Slot, st.floats(1, 20), st.floats(0.01, 3)), max_size=8)


def late(slots: list[Slot], begin_s: float, between: float) -> list[Slot]:
    """Those that are late where the first turn begins at this time, each taking what is kept for it."""
    found, now_s = [], begin_s
    for slot in sorted(slots):
        now_s += slot.kept_s
        if now_s > slot.deadline_s + 1e-9:
            found.append(slot)
        now_s += slot.kept_s * between
    return found


@given(SLOTS, st.sampled_from((0.0, 0.25)))
def test_none_is_late_from_the_latest_start_and_one_is_from_any_later(slots: list[Slot], between: float) -> None:
    start_s = latest_start(slots, between)
    if not slots:
        assert start_s == math.inf
        return
    assert late(slots, start_s, between) == []
    assert late(slots, start_s + 0.01, between) != []


@given(SLOTS, st.floats(1, 20), st.floats(0, 5), st.sampled_from((0.0, 0.25)))
def test_what_fits_into_its_gap_makes_none_late(
    slots: list[Slot], deadline_s: float, free_s: float, between: float
) -> None:
    if late(slots, free_s, between):
        return
    found = gap(slots, deadline_s, free_s, between)
    time_s = (found.end_s - found.begin_s) / (1 + between)
    if time_s > 0:
        assert late([*slots, Slot(deadline_s, time_s)], free_s, between) == []


def test_those_with_the_same_deadline_go_first() -> None:
    found = gap([Slot(5.0, 1.0), Slot(9.0, 2.0)], 5.0, free_s=0.5, between=0.25)
    assert (found.n_ahead, found.begin_s) == (1, 1.75)
    assert found.end_s == 5.0
    assert found.all_s == pytest.approx(1.75 + 2.5)


def test_a_gap_ends_where_the_next_must_begin() -> None:
    assert gap([Slot(4.0, 3.0)], 2.0, free_s=0.0, between=0.0).end_s == 1.0
