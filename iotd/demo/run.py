"""`iotd demo`: a broker, a simulated home, the daemon, and questions over real gRPC whose answers can be checked.

The daemon is a process of its own, and all it knows came over MQTT; the home is a thread here, so that its truth is at
hand.
"""

import contextlib
import math
import random
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from iotd.client import Client
from iotd.demo import simulate
from iotd.demo.broker import embedded_broker
from iotd.demo.child import Child, signals_interrupt
from iotd.demo.daemon import DEMO_SECTIONS, START_S, home_daemon, wait_for
from iotd.demo.ledger import Ledger
from iotd.demo.package import demo_package
from iotd.demo.questions import KIND_WEIGHTS, Question
from iotd.demo.screen import Asked, Screen, open_screen
from iotd.errors import IotdError
from iotd.events import ServerStatus

SEED = 115
"""A home with doors open, and a car, a parcel, a dog and a person to be seen, within the first minute."""
PAUSE_S = 2.0
"""Between two questions."""
LOOK_S = 1.0
"""Between two looks at the daemon's figures."""
SLACK_S = 0.25
"""An answer counts as late when its last event came later than its budget and this, for the way back."""
NODE = "demo"
BUDGET_S = {"brief": 2.0, "json": 3.0, "sentence": 3.0, "long": 5.0}
"""By the form of the answer that is asked for."""
MAX_TOKENS = 96

READINGS_HZ, FRAMES_HZ = 8.0, 1.0
"""A round of this home's devices has 18 readings of 17 tokens, and 2 frames of 42: the newest half of the window holds
more than that."""
SPEED = 20.0
"""Seconds in the home to one here: somebody comes to the door once a minute."""


def run(*, for_s: float | None, seed: int = SEED, as_json: bool) -> int:
    """Run until Ctrl-C, or for `for_s` seconds. Returns 0 where every question was answered in time, else 1.

    seed: of the home and the questions. Raises IotdError where a part does not start, or ends by itself.
    """
    tally = _Tally(time.monotonic())
    with signals_interrupt(), open_screen(as_json) as screen:
        with contextlib.suppress(KeyboardInterrupt), _stage(screen, seed) as stage:
            _converse(stage, screen, tally, random.Random(seed), for_s)
        screen.say(tally.text, **tally.facts)
    return 0 if tally.ok else 1


class _Tally:
    def __init__(self, began_s: float) -> None:
        self._began_s = began_s
        self._asked = self._right = self._in_time = 0
        self._first_right_s: float | None = None

    def add(self, asked: Asked) -> None:
        self._asked += 1
        self._right += asked.right
        self._in_time += asked.in_time
        if asked.right and self._first_right_s is None:
            self._first_right_s = round(time.monotonic() - self._began_s, 3)

    @property
    def ok(self) -> bool:
        return 0 < self._asked == self._in_time

    @property
    def facts(self) -> dict[str, object]:
        return {
            "asked": self._asked,
            "right": self._right,
            "in_time": self._in_time,
            "first_right_s": self._first_right_s,
            "ok": self.ok,
        }

    @property
    def text(self) -> str:
        counts = f"questions asked {self._asked}, answered right {self._right}, in time {self._in_time}"
        return counts + (f"; the first right answer after {self._first_right_s:.1f} s" if self._first_right_s else "")


@dataclass(frozen=True, slots=True)
class _Stage:
    """All that runs."""

    daemon: Child
    home: "Future[simulate.Totals]"
    client: Client
    ledger: Ledger

    def status(self) -> ServerStatus:
        """The daemon's. Raises IotdError where the daemon or the home has ended."""
        self.daemon.check()
        if self.home.done():
            self.home.result()
        return self.client.status()


@contextlib.contextmanager
def _stage(screen: Screen, seed: int) -> Iterator[_Stage]:
    """Started in order and stopped in the opposite one: broker, daemon, simulated home."""
    screen.say(
        "The model is the demo's own: a very small Qwen3.5 that was trained on simulated homes and knows no more."
    )
    package = demo_package(screen.say)
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(embedded_broker())
        daemon, target = stack.enter_context(
            home_daemon(package, (broker.host, broker.port), node=NODE, start_s=START_S, **DEMO_SECTIONS)
        )
        client = stack.enter_context(Client(target))
        _introduce(screen, target, broker.host, broker.port)
        wait_for("connection to the broker", lambda: (link := client.status().link) and link.connected)
        ledger = Ledger()
        home = stack.enter_context(
            simulate.running(
                broker.host,
                broker.port,
                seed=seed,
                rate_hz=READINGS_HZ,
                frame_hz=FRAMES_HZ,
                speed=SPEED,
                lived_in=True,
                tell=ledger.tell,
            )
        )
        yield _Stage(daemon, home, client, ledger)


def _introduce(screen: Screen, target: str, host: str, port: int) -> None:
    screen.say(f"broker   {host}:{port}    mosquitto_sub -h {host} -p {port} -t '#' -v", broker=f"{host}:{port}")
    screen.say(f'gRPC     {target}    iotd ask --target {target} "Is a door open?"', grpc=target)


def _converse(stage: _Stage, screen: Screen, tally: _Tally, rng: random.Random, for_s: float | None) -> None:
    """Ask one question after the other."""
    wait_for("frame read", lambda: stage.status().engine.counters.get("frames_read"))
    end_s = time.monotonic() + for_s if for_s else math.inf
    for question in _questions(stage, rng):
        asked = _ask(stage.client, question)
        tally.add(asked)
        screen.asked(asked)
        _look_on(stage, screen, min(time.monotonic() + PAUSE_S, end_s))
        if time.monotonic() >= end_s:
            return


def _questions(stage: _Stage, rng: random.Random) -> Iterator[Question]:
    """Endless: one of each kind, in any order, before any kind comes again."""
    while True:
        kinds = [*KIND_WEIGHTS]
        while kinds:
            question = wait_for("settled answer", partial(stage.ledger.question, rng, kinds))
            kinds.remove(question.kind)
            yield question


def _look_on(stage: _Stage, screen: Screen, until_s: float) -> None:
    """Show the daemon's figures until then."""
    screen.status(stage.status())
    while (left_s := until_s - time.monotonic()) > 0:
        time.sleep(min(left_s, LOOK_S))
        screen.status(stage.status())


def _ask(client: Client, question: Question) -> Asked:
    began_s = time.monotonic()
    budget_s = BUDGET_S[question.form]
    text, first_s, reason, error = "", 0.0, "", ""
    try:
        with client.ask(question.text, budget_s=budget_s, max_tokens=MAX_TOKENS) as answer:
            for piece in answer:
                first_s = first_s or time.monotonic() - began_s
                text += piece
            reason = answer.result.finish_reason.value
    except IotdError as e:
        error = str(e)
    total_s = time.monotonic() - began_s
    return Asked(
        kind=question.kind,
        question=question.text,
        truth=question.answer,
        budget_s=budget_s,
        text=text,
        right=not error and question.right(text),
        finish_reason=reason,
        first_token_s=first_s,
        total_s=total_s,
        in_time=not error and total_s <= budget_s + SLACK_S,
        error=error,
    )
