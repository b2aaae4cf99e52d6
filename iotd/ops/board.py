"""Readings of the board itself: memory and cores. None where a board has no such thing."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

from iotd.files import lines

PROC = Path("/proc")
THERMAL = Path("/sys/class/thermal")
LISTENING = "0A"
"""Of a TCP socket (Linux, include/net/tcp_states.h)."""


def resident_nbytes(pid: int | None = None) -> int:
    """Memory of a process that lies in RAM, in bytes; this process by default. 0 where it cannot be read."""
    return _status_field("VmRSS", pid)


def anonymous_nbytes(pid: int | None = None) -> int:
    """The part of it that the kernel cannot drop and read again from a file."""
    return _status_field("RssAnon", pid)


def available_nbytes() -> int | None:
    """Memory that new work can take without swapping."""
    for line in lines(PROC / "meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def temperature_c() -> float | None:
    """The processor's temperature, °C."""
    for zone in sorted(THERMAL.glob("thermal_zone*/temp")):
        found = lines(zone)
        if found and found[0].lstrip("-").isdigit():
            return int(found[0]) / 1000
    return None


def give_back_memory() -> None:
    """Hand what the C library has kept of freed memory back to the kernel, where it is glibc."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0))


def listener_pid(port: int) -> int | None:
    """The process that listens on this TCP port, where this user may look into it."""
    tables = [line.split() for table in ("tcp", "tcp6") for line in lines(PROC / "net" / table)[1:]]
    sockets = {
        f"socket:[{row[9]}]" for row in tables if row[3] == LISTENING and int(row[1].rpartition(":")[2], 16) == port
    }
    for process in PROC.glob("[0-9]*"):
        with suppress(OSError):
            if any(str(opened.readlink()) in sockets for opened in (process / "fd").iterdir()):
                return int(process.name)
    return None


def _status_field(name: str, pid: int | None) -> int:
    for line in lines(PROC / str(pid or "self") / "status"):
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0
