"""What can be known of a home at the end of each line of its stream, as labels: probes learn to read it off a network.

The probes are thrown away with the training. They give every line of the stream something to be right about, where
questions ask about one in a hundred: what one answer teaches of keeping track, a line teaches fifty times over.
"""

import numpy as np
from numpy.typing import NDArray

from iotd.demo.home import DOORS, HEATED_C
from iotd.demo.questions import SIDES, Told, extreme_of, side_of
from iotd.demo.scene import COLOURS, KINDS

Labels = NDArray[np.int64]
UNKNOWN = -100
"""Of a probe that has no right answer now; torch's cross entropy leaves it out."""
_ROOMS, _COLOURS = (*HEATED_C,), (*COLOURS,)
CHOICES = (
    *[3] * len(DOORS),
    *[3] * len(HEATED_C),
    *[len(HEATED_C), 10, 10, 10] * 2,
    *[1 + len(COLOURS)] * len(KINDS),
    *[len(SIDES)] * len(KINDS),
    1 + len(KINDS),
)
"""How many answers each probe has: doors and motion (0 unheard of), the warmest and the coldest room with the digits of
their temperatures, what is in the newest picture (0 absent) and where each thing is, how many there are."""
_N_STATES = len(DOORS) + len(HEATED_C)
WORTH = (*[1.0] * _N_STATES, *[5.0, 1.0, 1.0, 1.0] * 2, *[1.0] * (len(CHOICES) - _N_STATES - 8))
"""Of each probe, against the others: comparing is what takes the longest to learn."""


def labels(told: Told) -> Labels:
    """The right answer of each probe, [len(CHOICES)]."""
    doors, motion = told.sensors("door"), told.sensors("motion")
    found = [_state(doors.get(door), "open") for door in DOORS]
    found += [_state(motion.get(room), "detected") for room in _ROOMS]
    for best in (max, min):
        found += _extreme(extreme_of(told, best))
    return np.array(found + _seen(told), np.int64)


def _state(value: str | None, active: str) -> int:
    return 0 if value is None else 2 if value == active else 1


def _extreme(extreme: tuple[str, str] | None) -> list[int]:
    """The room, and the tens, units and tenths of its temperature in °C."""
    if extreme is None:
        return [UNKNOWN] * 4
    room, value = extreme
    tenths = abs(round(10 * float(value.split()[0])))
    return [_ROOMS.index(room), tenths // 100 % 10, tenths // 10 % 10, tenths % 10]


def _seen(told: Told) -> list[int]:
    if told.scene is None:
        return [UNKNOWN] * (2 * len(KINDS) + 1)
    things = {thing.kind: thing for thing in told.scene.things}
    colours = [1 + _COLOURS.index(things[kind].colour) if kind in things else 0 for kind in KINDS]
    sides = [SIDES.index(side_of(things[kind], told.scene)) if kind in things else UNKNOWN for kind in KINDS]
    return [*colours, *sides, len(things)]
