"""A command of iotd as a child process that ends with its parent's `with` block. Knows nothing of what it does."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

from iotd.errors import Unavailable

STOP_S = 20.0
KEPT_LINES = 20
"""Of its log, for the error where it ends unasked."""


class Child:
    """One running command, and the JSON records it logs to standard error."""

    def __init__(self, name: str, *args: str, env: Mapping[str, str] | None = None) -> None:
        self._name = name
        # A process group of its own: Ctrl-C reaches the demo alone, which then stops its children in order.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "iotd", *args],
            env=os.environ | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        self._records: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._last: list[str] = []
        self._reader = threading.Thread(target=self._read, name=f"log of {name}", daemon=True)
        self._reader.start()

    def wait_for(self, message: str, timeout_s: float) -> dict[str, Any]:
        """The record with this message. Raises Unavailable where the child ends first, or nothing comes."""
        while True:
            try:
                record = self._records.get(timeout=timeout_s)
            except queue.Empty:
                raise Unavailable(f"{self._name} was not ready within {timeout_s:g} s:\n{self._tail()}") from None
            if record is None:
                raise Unavailable(f"{self._name} ended:\n{self._tail()}")
            if record.get("message") == message:
                return record

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def check(self) -> None:
        """Raises Unavailable where it has ended unasked."""
        if not self.running:
            raise Unavailable(f"{self._name} ended with code {self._process.returncode}:\n{self._tail()}")

    def stop(self) -> None:
        """SIGTERM, and after a while SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(STOP_S)

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                self._last = [*self._last[-KEPT_LINES + 1 :], line.rstrip()]
                with contextlib.suppress(ValueError):
                    self._records.put(json.loads(line))
        self._records.put(None)

    def _tail(self) -> str:
        return "\n".join(f"  {line}" for line in self._last)


@contextlib.contextmanager
def child(name: str, *args: str, env: Mapping[str, str] | None = None) -> Iterator[Child]:
    """A running command; stopped at the end, whatever happens."""
    process = Child(name, *args, env=env)
    try:
        yield process
    finally:
        process.stop()


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM and a closed terminal end this process as Ctrl-C does, so that no child outlives it."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for other in old:
            signal.signal(other, signal.SIG_IGN)  # what follows is the stop; its waits have limits
        raise KeyboardInterrupt

    old = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
