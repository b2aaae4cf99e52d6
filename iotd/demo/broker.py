"""A broker of its own for the demo: mosquitto where it is installed, else amqtt in a thread (MQTT 3.1.1 only).

On a free port of the loopback interface, open to whoever is on this machine.
"""

import asyncio
import logging
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from iotd.errors import Unavailable

START_S = 10.0
"""How long a broker may take to listen."""

_SYSTEM_PATHS = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")
"""Where Debian and others put mosquitto: not on every user's PATH."""


def mosquitto_path() -> str | None:
    return shutil.which("mosquitto", path=os.pathsep.join((os.environ.get("PATH", ""), *_SYSTEM_PATHS)))


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Broker:
    """A context manager: its broker listens inside the `with` block. Raises Unavailable where it cannot be started."""

    host = "127.0.0.1"
    port: int
    kind: str
    """`mosquitto` or `amqtt`."""

    def start(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Mosquitto(_Broker):
    """A mosquitto process on one loopback port; can be killed, and started again on the same port."""

    kind = "mosquitto"

    def __init__(self, *, port: int = 0, extra: str = "") -> None:
        """port: 0 takes a free one. extra: more lines of mosquitto.conf; without any, everyone is let in."""
        self.port = port
        self._chosen = port != 0
        self._extra = extra or "allow_anonymous true"
        self._folder = tempfile.TemporaryDirectory(prefix="iotd-mosquitto-")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once it listens. Raises Unavailable, with mosquitto's own words, where it does not."""
        path = mosquitto_path()
        if path is None:
            raise Unavailable("mosquitto is not installed (Debian: apt install mosquitto)")
        for _ in range(5):
            if not self._chosen:
                self.port = free_port()
            self._process = self._spawn(path)
            if self._listens():
                self._chosen = True
                return
            # Another program was faster to the port.
            self.kill()
            if self._chosen:
                break
        raise Unavailable(
            f"mosquitto does not listen on port {self.port}: {self._log.read_text(errors='replace')[-500:]}"
        )

    def stop(self) -> None:
        """End it in order: clients are disconnected, their last wills are not sent."""
        self._end(subprocess.Popen.terminate)

    def kill(self) -> None:
        """As a power cut would."""
        self._end(subprocess.Popen.kill)

    def close(self) -> None:
        self.stop()
        self._folder.cleanup()

    @property
    def _log(self) -> Path:
        return Path(self._folder.name, "log")

    def _spawn(self, path: str) -> "subprocess.Popen[bytes]":
        config = Path(self._folder.name, "mosquitto.conf")
        lines = [f"listener {self.port} {self.host}", "persistence false", "log_type error", "log_dest stderr"]
        if os.getuid() == 0:
            # It would take another user's rights, and then read no file of ours.
            lines.append(f"user {pwd.getpwuid(0).pw_name}")
        config.write_text("\n".join([*lines, self._extra, ""]))
        with self._log.open("wb") as log:
            # A session of its own: Ctrl-C in the terminal is for whoever started the broker, and may still need it.
            return subprocess.Popen(
                [path, "-c", str(config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _listens(self) -> bool:
        return _wait_for_port(self.host, self.port, self._is_alive)

    def _is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _end(self, how: Callable[["subprocess.Popen[bytes]"], None]) -> None:
        if self._process is not None:
            how(self._process)
            self._process.wait()
            self._process = None


class Amqtt(_Broker):
    """amqtt's broker in a thread with an event loop of its own. Needs the `demo` extra; speaks MQTT 3.1.1 only."""

    kind = "amqtt"

    def __init__(self) -> None:
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._started = threading.Event()
        self._failure = ""
        self._thread = threading.Thread(target=self._run, name="iotd-amqtt", daemon=True)

    def start(self) -> None:
        """Returns once it listens. Raises Unavailable where it does not."""
        self.port = free_port()
        self._thread.start()
        if not self._started.wait(START_S) or self._failure:
            raise Unavailable(f"amqtt did not start: {self._failure or 'no answer'}")

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(START_S)
        elif not self._loop.is_closed():
            self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except Exception as e:  # noqa: BLE001 - the edge of the thread: whoever started it is told
            self._failure = f"{type(e).__name__}: {e}"
        finally:
            self._started.set()
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    async def _serve(self) -> None:
        # It logs every connection, and each refusal of MQTT 5 as an error.
        logging.getLogger("amqtt").setLevel(logging.CRITICAL + 1)
        logging.getLogger("transitions").setLevel(logging.ERROR)
        from amqtt.broker import Broker  # type: ignore[import-untyped]  # ships no types

        broker = Broker(
            {
                "listeners": {"default": {"type": "tcp", "bind": f"{self.host}:{self.port}"}},
                "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
            }
        )
        await broker.start()
        self._started.set()
        await self._stopping.wait()
        await broker.shutdown()


def embedded_broker(kind: str = "") -> Mosquitto | Amqtt:
    """A broker that lives as long as its `with` block. kind: which one; empty takes mosquitto where it is installed."""
    return Mosquitto() if (kind or ("mosquitto" if mosquitto_path() else "amqtt")) == "mosquitto" else Amqtt()


def _wait_for_port(host: str, port: int, alive: Callable[[], bool]) -> bool:
    """Whether someone listens there, while `alive` says that it is worth waiting."""
    deadline_s = time.monotonic() + START_S
    while alive() and time.monotonic() < deadline_s:
        try:
            with socket.create_connection((host, port), timeout=1):
                return alive()
        except OSError:
            time.sleep(0.02)
    return False
