"""The daemon speaks sd_notify as systemd expects it, and its unit is clean and well confined."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import PATIENCE_S

from iotd.ops.systemd import Notifier

UNIT = Path(__file__).parents[1] / "systemd" / "iotd.service"
MOST_EXPOSURE = 2.0

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """systemd's end of the line, and its name as NOTIFY_SOCKET has it."""
    name = f"@iotd-test-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.settimeout(PATIENCE_S)
        s.bind(name.replace("@", "\0") if name.startswith("@") else name)
        yield name, s


def test_every_message_has_systemds_form(manager: tuple[str, socket.socket]) -> None:
    name, received = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    for send, expected in [
        (lambda: notifier.extend(30), "EXTEND_TIMEOUT_USEC=30000000"),
        (lambda: notifier.ready("context 3/128"), "READY=1\nSTATUS=context 3/128"),
        (lambda: notifier.status("busy"), "STATUS=busy"),
        (notifier.alive, "WATCHDOG=1"),
        (lambda: notifier.stopping("drains"), "STOPPING=1\nSTATUS=drains"),
    ]:
        send()
        assert received.recv(4096).decode() == expected


def test_a_reload_carries_its_monotonic_time(manager: tuple[str, socket.socket]) -> None:
    name, received = manager
    Notifier({"NOTIFY_SOCKET": name}).reloading()
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", received.recv(4096).decode())


def test_without_systemd_nothing_is_sent_and_nothing_fails() -> None:
    notifier = Notifier({})
    notifier.ready("ready")
    assert notifier.watchdog_s == 0


def test_a_manager_that_is_gone_is_no_reason_to_fail(tmp_path: Path) -> None:
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "absent")}).alive()


def test_the_watchdog_is_read_in_seconds_and_only_by_the_process_it_names() -> None:
    assert Notifier({"WATCHDOG_USEC": "90000000"}).watchdog_s == 90
    assert Notifier({"WATCHDOG_USEC": "90000000", "WATCHDOG_PID": str(os.getpid())}).watchdog_s == 90
    assert Notifier({"WATCHDOG_USEC": "90000000", "WATCHDOG_PID": "1"}).watchdog_s == 0


@needs_systemd
def test_the_unit_is_clean(tmp_path: Path) -> None:
    """The installed command does not exist here, so an existing one stands in for it."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/iotd/bin/iotd", sys.executable))
    result = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], check=False, capture_output=True, text=True, timeout=PATIENCE_S
    )
    complaints = [line for line in (result.stdout + result.stderr).splitlines() if "iotd" in line]
    assert (result.returncode, complaints) == (0, [])


@needs_systemd
def test_the_unit_exposes_little() -> None:
    result = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(UNIT)],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    overall = re.search(r"Overall exposure level.*?: ([\d.]+)", result.stdout)
    assert overall, result.stdout + result.stderr
    assert float(overall[1]) <= MOST_EXPOSURE


def test_the_unit_has_what_the_daemon_speaks() -> None:
    lines = UNIT.read_text().splitlines()
    for line in ("Type=notify", "NotifyAccess=main", "Restart=on-failure", "DynamicUser=yes", "ProtectSystem=strict"):
        assert line in lines
    assert any(line.startswith("WatchdogSec=") for line in lines)
    assert any(line.startswith("ExecReload=") and "-HUP" in line for line in lines)
