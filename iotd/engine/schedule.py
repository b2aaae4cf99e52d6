"""Earliest deadline first, with the time that is kept for each: where there is room for one more, and until when.

Pure arithmetic over deadlines and durations, in seconds on one clock. Knows no ask.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Slot:
    """One that waits."""

    deadline_s: float
    kept_s: float
    """What is kept for it from its turn on."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Where one more fits in."""

    n_ahead: int
    begin_s: float
    end_s: float
    """When it must have ended, by its own deadline and so that none behind it is late."""
    all_s: float
    """When all others have had their turns."""


def gap(slots: Collection[Slot], deadline_s: float, free_s: float, between: float) -> Gap:
    """For one with this deadline, behind those with the same.

    free_s: when the first turn can begin. between: what passes behind each turn, as a part of it.
    """
    in_order = sorted(slots)
    n_ahead = sum(slot.deadline_s <= deadline_s for slot in in_order)
    begin_s = free_s + sum(slot.kept_s for slot in in_order[:n_ahead]) * (1 + between)
    behind = in_order[n_ahead:]
    end_s = min(deadline_s, latest_start(behind, between))
    return Gap(n_ahead, begin_s, end_s, begin_s + sum(slot.kept_s for slot in behind) * (1 + between))


def latest_start(slots: Iterable[Slot], between: float) -> float:
    """When the first turn must begin, so that none is late; infinite where none waits."""
    latest_s, before_s = math.inf, 0.0
    for slot in sorted(slots):
        latest_s = min(latest_s, slot.deadline_s - before_s - slot.kept_s)
        before_s += slot.kept_s * (1 + between)
    return latest_s
