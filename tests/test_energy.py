"""Energy is what the machine's own meters say, in joules."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from iotd.ops import energy
from iotd.ops.energy import PowerMeter

PMIC = """\
   VDD_CORE_A current(7)=2.00000000A
     3V3_SYS_A current(1)=0.10000000A
   VDD_CORE_V volt(15)=0.75000000V
     3V3_SYS_V volt(9)=3.30000000V
       EXT5V_V volt(24)=5.15000000V
        BATT_V volt(25)=0.00000000V
"""


def write(root: Path, **files: str) -> Path:
    root.mkdir(parents=True)
    for name, text in files.items():
        (root / name).write_text(f"{text}\n")
    return root


@pytest.fixture
def vcgencmd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a command of that name onto the path, which prints a text."""

    def put(text: str) -> None:
        command = tmp_path / "bin" / "vcgencmd"
        command.parent.mkdir()
        command.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
        command.chmod(0o755)
        monkeypatch.setenv("PATH", str(command.parent), prepend=os.pathsep)

    return put


def test_packages_of_the_processor_are_added_and_may_begin_again(tmp_path: Path) -> None:
    """What lies within a package is in its own counter already."""
    zones = tmp_path / "class" / "powercap"
    first = write(zones / "intel-rapl:0", name="package-0", energy_uj="9000000", max_energy_range_uj="9999999")
    second = write(zones / "intel-rapl:1", name="package-1", energy_uj="1000000", max_energy_range_uj="9999999")
    inner = write(zones / "intel-rapl:0:0", name="core", energy_uj="0", max_energy_range_uj="9999999")
    meter = energy.rapl(tmp_path)
    assert meter

    def work() -> None:
        (first / "energy_uj").write_text("500000\n")
        (second / "energy_uj").write_text("3000000\n")
        (inner / "energy_uj").write_text("1400000\n")

    assert meter.joules(work) == pytest.approx(1.5 + 2.0)


def test_counters_that_only_root_may_read_are_none(tmp_path: Path) -> None:
    zone = write(tmp_path / "class" / "powercap" / "intel-rapl:0", name="package-0", max_energy_range_uj="9")
    (zone / "energy_uj").mkdir()  # for root as for anybody else: it cannot be read
    assert energy.rapl(tmp_path) is None


def test_a_monitor_is_found_by_its_power_and_one_of_graphics_is_not(tmp_path: Path) -> None:
    write(tmp_path / "class" / "hwmon" / "hwmon0", name="amdgpu", power1_input="90000000")
    assert energy.hwmon(tmp_path) is None
    write(tmp_path / "class" / "hwmon" / "hwmon1", name="ina219", power1_input="4500000")
    meter = energy.hwmon(tmp_path)
    assert meter
    assert meter.name == "ina219"
    began_s = time.perf_counter()
    joules = meter.joules(lambda: time.sleep(0.01))
    assert 4.5 * 0.01 <= joules <= 4.5 * (time.perf_counter() - began_s)


def test_power_is_read_while_the_work_goes_on() -> None:
    watts: list[float | None] = [4.0, None, 2.0]
    spent: list[float] = []

    def work() -> None:
        began_s = time.perf_counter()
        while watts:
            time.sleep(0.001)
        spent.append(time.perf_counter() - began_s)

    joules = PowerMeter("it", lambda: watts.pop() if watts else 3.0).joules(work)
    assert joules == pytest.approx(3.0 * spent[0], rel=0.1)


def test_rails_of_a_pi_5_count_where_current_and_voltage_are_told(vcgencmd: Callable[[str], None]) -> None:
    vcgencmd(PMIC)
    meter = energy.pmic()
    assert meter
    assert meter.joules(lambda: None) >= 0
    assert energy._pmic_watts() == pytest.approx(2.0 * 0.75 + 0.1 * 3.3)


def test_an_older_pi_has_no_such_rails(vcgencmd: Callable[[str], None]) -> None:
    vcgencmd('error=1 error_msg="Command not registered"\n')
    assert energy.pmic() is None


def test_a_machine_without_meters_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "SYS", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert energy.meter() is None
