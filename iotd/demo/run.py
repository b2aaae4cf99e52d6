"""`iotd demo`: a broker, a simulated home, the daemon, and questions over real gRPC, in one tree of processes.

The model is tiny and random for now: what it answers is noise, and when it answers is not.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

from iotd import __version__
from iotd.client import Client
from iotd.convert.convert import convert_random
from iotd.demo.broker import embedded_broker
from iotd.demo.child import Child, child
from iotd.demo.screen import Asked, Screen, open_screen
from iotd.demo.simulate import home_subscriptions
from iotd.errors import IotdError, PackageError, Unavailable
from iotd.model import Model

START_S = 60.0
PAUSE_S = 2.0
"""Between two questions."""
SLACK_S = 0.25
"""An answer counts as late when its last event came later than its budget and this, for the way back."""
NODE = "demo"


@dataclass(frozen=True, slots=True)
class Question:
    """One of the demo's questions."""

    text: str
    budget_s: float
    camera: str | None = None
    max_tokens: int = 32


QUESTIONS = (
    Question("Is any door open?", 2.0),
    Question("Which room is the warmest, and how warm is it?", 3.0),
    Question("What does the camera at the door show?", 5.0, camera="door"),
    Question("Summarise the last minutes at length.", 1.0, max_tokens=1000),
)


def run(*, for_s: float | None, as_json: bool) -> int:
    """Run until Ctrl-C, or for `for_s` seconds. Returns 0 where every question was answered in time, else 1.

    Raises IotdError where a part does not start, or ends by itself.
    """
    with _signals_interrupt(), open_screen(as_json) as screen:
        tally = _Tally()
        with contextlib.suppress(KeyboardInterrupt), _home(screen) as (daemon, target):
            _converse(daemon, target, screen, tally, for_s)
        screen.say(
            f"questions asked {tally.asked}, answered in time {tally.in_time}",
            asked=tally.asked,
            in_time=tally.in_time,
            ok=tally.ok,
        )
    return 0 if tally.ok else 1


@dataclass(slots=True)
class _Tally:
    asked: int = 0
    in_time: int = 0

    @property
    def ok(self) -> bool:
        return 0 < self.asked == self.in_time


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and a closed terminal end the demo as Ctrl-C does, so that no child outlives it."""

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


@contextlib.contextmanager
def _home(screen: Screen) -> Iterator[tuple[Child, str]]:
    """The whole scene, started in order and stopped in the opposite one: broker, daemon, simulated home."""
    screen.say("The model is tiny and random: its answers are noise. What is real: the way, the times, the memory.")
    package = _package()
    with embedded_broker() as broker, tempfile.TemporaryDirectory(prefix="iotd-demo-") as folder:
        host, port = broker.host, broker.port
        config = Path(folder) / "iotd.yaml"
        config.write_text(json.dumps(_config(package, host, port)))
        with child("the daemon", "serve", "-c", str(config), env={"IOTD_LOG__FORMAT": "json"}) as daemon:
            target = daemon.wait_for("ready", START_S)["grpc"]
            with child(
                "the simulated home", "simulate", "--host", host, "--port", str(port), "--rate", "5", "--frames", "1"
            ):
                _introduce(screen, target, host, port)
                yield daemon, target


def _introduce(screen: Screen, target: str, host: str, port: int) -> None:
    screen.say(f"broker   {host}:{port}    mosquitto_sub -h {host} -p {port} -t '#' -v", broker=f"{host}:{port}")
    screen.say(f'gRPC     {target}    iotd ask --target {target} "Is a door open?"', grpc=target)


def _converse(daemon: Child, target: str, screen: Screen, tally: _Tally, for_s: float | None) -> None:
    """Ask one question after the other."""
    with Client(target) as client:
        _wait_for_frame(client)
        end_s = time.monotonic() + for_s if for_s else float("inf")
        for question in itertools.cycle(QUESTIONS):
            screen.status(client.status())
            asked = _ask(client, question)
            tally.asked += 1
            tally.in_time += asked.in_time
            screen.asked(asked)
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                return
            time.sleep(min(PAUSE_S, left_s))
            daemon.check()


def _ask(client: Client, question: Question) -> Asked:
    began_s = time.monotonic()
    text, first_s, reason, error = "", 0.0, "", ""
    try:
        with client.ask(
            question.text, camera=question.camera, budget_s=question.budget_s, max_tokens=question.max_tokens
        ) as answer:
            for piece in answer:
                first_s = first_s or time.monotonic() - began_s
                text += piece
            reason = answer.result.finish_reason.value
    except IotdError as e:
        error = str(e)
    total_s = time.monotonic() - began_s
    in_time = not error and total_s <= question.budget_s + SLACK_S
    return Asked(question.text, question.budget_s, text, reason, first_s, total_s, in_time, error)


def _wait_for_frame(client: Client) -> None:
    """Until the first frame has been read: from then on a camera can be asked about, and every graph has run once."""
    end_s = time.monotonic() + START_S
    while not client.status().engine.counters.get("frames_read"):
        if time.monotonic() > end_s:
            raise Unavailable(f"no frame came within {START_S:g} s")
        time.sleep(0.1)


def _config(package: Path, host: str, port: int) -> dict[str, Any]:
    return {
        "model": {"path": str(package)},
        "context": {"window": 2048},
        "mqtt": {
            "host": host,
            "port": port,
            "node": NODE,
            "subscriptions": msgspec.to_builtins(home_subscriptions()),
        },
        "grpc": {"listen": "127.0.0.1:0"},
    }


def _package() -> Path:
    """The tiny model in the user's cache; converted where this iotd cannot open what lies there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "iotd" / f"demo-{__version__}"
    try:
        Model.open(folder, threads=1)
    except PackageError:
        shutil.rmtree(folder, ignore_errors=True)
        convert_random("tiny", folder, recipe="fp32")
    return folder
