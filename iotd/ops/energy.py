"""The energy that work takes, where the machine measures it: the processor's counters, a Pi 5's supply, a monitor.

It is all that is measured there, the rest of the board and what it takes at rest included.
"""

import re
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from iotd.files import lines

SYS = Path("/sys")
EVERY_S = 0.1
"""Between two readings of a power that changes."""
GRAPHICS = {"amdgpu", "i915", "nouveau", "xe"}
"""Power monitors of what computes nothing here."""


class Meter(Protocol):
    @property
    def name(self) -> str:
        """What it measures."""

    def joules(self, work: Callable[[], object]) -> float:
        """That are taken while the work is done."""


def meter() -> Meter | None:
    """The first that this user may read; None where there is none."""
    return rapl(SYS) or pmic() or hwmon(SYS)


class CounterMeter:
    """Counters of energy, in microjoules, that begin again from 0 behind their highest."""

    def __init__(self, name: str, counters: dict[Path, int]) -> None:
        """counters: each with its highest."""
        self.name = name
        self._counters = counters

    def joules(self, work: Callable[[], object]) -> float:
        """To the counters' last digit; work may not take so long that one comes around twice."""
        before = {path: _number(path) or 0 for path in self._counters}
        work()
        return sum(((_number(path) or 0) - before[path]) % (top + 1) for path, top in self._counters.items()) / 1e6


class PowerMeter:
    """A power that is read again and again while the work is done."""

    def __init__(self, name: str, watts: Callable[[], float | None]) -> None:
        self.name = name
        self._watts = watts

    def joules(self, work: Callable[[], object]) -> float:
        """Mean power × time."""
        readings: list[float | None] = []
        done = threading.Event()

        def read() -> None:
            while not done.wait(EVERY_S):
                readings.append(self._watts())

        reader = threading.Thread(target=read)
        reader.start()
        began_s = time.perf_counter()
        try:
            work()
        finally:
            took_s = time.perf_counter() - began_s
            done.set()
            reader.join()
        told = [watts for watts in readings if watts is not None] or [self._watts() or 0.0]
        return statistics.fmean(told) * took_s


def rapl(sys: Path) -> Meter | None:
    """Running average power limit: the processor's packages (Linux, Documentation/power/powercap/powercap.rst)."""
    counters = {}
    for zone in sorted(sys.glob("class/powercap/intel-rapl*")):
        top = _number(zone / "max_energy_range_uj")
        if top and lines(zone / "name")[:1] and lines(zone / "name")[0].startswith("package"):
            if _number(zone / "energy_uj") is None:  # root's alone, since they gave secrets away
                return None
            counters[zone / "energy_uj"] = top
    return CounterMeter("processor", counters) if counters else None


def pmic() -> Meter | None:
    """What the supply chip of a Raspberry Pi 5 gives to all that is on the board; not USB, nor its own losses."""
    return PowerMeter("board", _pmic_watts) if shutil.which("vcgencmd") and _pmic_watts() is not None else None


def hwmon(sys: Path) -> Meter | None:
    """The first power monitor (Linux, Documentation/hwmon/sysfs-interface.rst: microwatts)."""
    for power in sorted(sys.glob("class/hwmon/hwmon*/power*_input")):
        name = "".join(lines(power.with_name("name"))[:1])
        if name not in GRAPHICS and _number(power) is not None:
            return PowerMeter(name, partial(_watts, power))
    return None


def _watts(power: Path) -> float | None:
    microwatts = _number(power)
    return None if microwatts is None else microwatts / 1e6


def _pmic_watts() -> float | None:
    """Current × voltage of every rail whose both are told."""
    told = subprocess.run(["vcgencmd", "pmic_read_adc"], check=False, capture_output=True, text=True).stdout
    found = {(rail, unit): float(value) for rail, unit, value in re.findall(r"(\w+)_([AV]) \w+\(\d+\)=([\d.]+)", told)}
    powers = [
        amperes * found[rail, "V"] for (rail, unit), amperes in found.items() if unit == "A" and (rail, "V") in found
    ]
    return sum(powers) if powers else None


def _number(path: Path) -> int | None:
    text = "".join(lines(path)[:1])
    return int(text) if text.isdigit() else None
