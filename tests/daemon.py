"""A real `iotd serve` as a child process, for tests: started from a configuration, watched through its JSON log."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patience import PATIENCE_S


class ServeProcess:
    """The running daemon. Every wait has a limit, and what the log said is in the failure's message."""

    def __init__(self, config: Path, env: dict[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "iotd", "serve", "-c", str(config)],
            env=os.environ | {"IOTD_LOG__FORMAT": "json"} | (env or {}),
            stderr=subprocess.PIPE,
            text=True,
        )
        self._records: queue.Queue[dict[str, Any]] = queue.Queue()
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.target = ""

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> "ServeProcess":
        self.target = self.wait_log("ready")["grpc"]
        return self

    def wait_log(self, message: str, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        """The next record whose message begins so; what came before it is passed over."""
        while True:
            try:
                record = self._records.get(timeout=timeout_s)
            except queue.Empty:
                raise AssertionError(f"{message!r} was not logged in {timeout_s} s:\n" + "\n".join(self.log)) from None
            if not record:
                raise AssertionError(f"the daemon ended without {message!r}:\n" + "\n".join(self.log))
            if str(record.get("message", "")).startswith(message):
                return record

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Its exit code."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n" + "\n".join(self.log)) from None
        self._reader.join(timeout_s)
        return code

    def stop(self) -> int:
        self.send(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join(PATIENCE_S)
        if self._process.stderr:
            self._process.stderr.close()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log.append(line.rstrip())
            with contextlib.suppress(ValueError):
                self._records.put(json.loads(line))
        self._records.put({})


@contextlib.contextmanager
def serving(folder: Path, config: dict[str, Any], env: dict[str, str] | None = None) -> Iterator[ServeProcess]:
    """A daemon on a free port, not yet waited for; killed at the end if it still runs."""
    path = write_config(folder, config)
    process = ServeProcess(path, env)
    try:
        yield process
    finally:
        process.kill()


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """JSON is YAML."""
    path = folder / "iotd.yaml"
    path.write_text(json.dumps({"grpc": {"listen": "127.0.0.1:0"}, "snapshot": {"path": ""}} | config))
    return path
