"""Speaks sd_notify(3) to systemd: readiness, status, watchdog. Without NOTIFY_SOCKET every call does nothing."""

import logging
import os
import socket
import time
from collections.abc import Mapping

log = logging.getLogger(__name__)


class Notifier:
    """One daemon's line to its service manager."""

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        self._address = env.get("NOTIFY_SOCKET", "")
        watched = env.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_s = int(env.get("WATCHDOG_USEC", "0")) / 1e6 if watched else 0.0
        """Seconds within which `alive` must be called again; 0 where there is no watchdog."""

    def ready(self, status: str) -> None:
        """Started, or done reloading."""
        self._send(f"READY=1\nSTATUS={status}")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={text}")

    def extend(self, seconds: float) -> None:
        """Ask for `seconds` more to start or to stop."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def alive(self) -> None:
        """Feed the watchdog."""
        self._send("WATCHDOG=1")

    def reloading(self) -> None:
        """A reload begins; `ready` ends it. The time tells systemd which of its signals is meant."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str) -> None:
        """A stop begins."""
        self._send(f"STOPPING=1\nSTATUS={status}")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        # A leading @ is systemd's spelling of Linux's abstract namespace, which the kernel marks by a null byte.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
                s.settimeout(1.0)
                s.connect(address)
                s.send(text.encode())
        except OSError as e:
            log.warning("systemd cannot be told %r: %s", text, e)
