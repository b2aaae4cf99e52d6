"""How well a daemon keeps budgets, measured at a client over loopback gRPC while it reads a simulated home.

Asks arrive whether or not earlier ones have been answered, as those of many clients do.
"""

import asyncio
import contextlib
import gc
import random
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from iotd.client import AsyncClient, Client
from iotd.demo.arrivals import Arrival, Kind, arrivals, budgets_for, kinds, mean_service_s
from iotd.demo.broker import embedded_broker
from iotd.demo.budget_asks import AMPLE_S, ask, judge
from iotd.demo.budget_score import Asked, LoadScore, score
from iotd.demo.daemon import DEMO_SECTIONS, START_S, home_daemon, wait_for
from iotd.demo.home_process import HomeProcess
from iotd.demo.package import is_demo
from iotd.demo.questions import FORMS, Question
from iotd.errors import InvalidInput, Unavailable
from iotd.model.chat import ChatTemplate
from iotd.model.package import CHAT, read_manifest

CALIBRATION_ASKS, CALIBRATION_TOKENS = 7, 24
SERVICE_ASKS, SERVICE_S = 4, 30.0
"""Of each kind, to find what the mix takes; fewer where that takes longer, but one."""
PREPARE_S = 0.2
"""The question of an ask is drawn so long before it is due, as that takes some milliseconds."""
LEAD_S = 0.5
"""Before the first ask of a load."""
SPEED = 20.0
"""Seconds in the home to one here."""
HOG = ("stress-ng", "--cpu", "0")
"""A worker on every core."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is to be measured."""

    threads: int = 2
    seed: int = 0
    rate_hz: float = 10.0
    """Readings of the home."""
    frame_hz: float = 0.5
    """Frames of its camera, where the package can see."""
    asks: int = 200
    """Of each load."""
    budgets_s: tuple[float, float] | None = None
    """The shortest and the longest; None takes what suits the model's speed."""
    check_refused: float = 0.2
    """The share of refused asks that are sent again."""
    baseline: bool = False
    """Whether each load is repeated with a fixed cut."""
    hog: bool = False
    """Whether all cores are kept busy in the middle third of each load."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What this package takes on the idle daemon, at the client."""

    first_s: float
    """From an ask to the first text of its answer, the median."""
    step_s: float
    """From token to token, the median."""
    budgets_s: tuple[float, float]
    service_s: float
    """What an ask of the mix takes on average, at most its budget."""
    vision: bool
    judged: bool
    """Whether answers can be right: this is the demo's model."""


class BudgetBench:
    """A broker, a daemon on a package, and a simulated home, inside a `with` block."""

    def __init__(self, package: Path, settings: Settings) -> None:
        """Raises PackageError where that is none, InvalidInput where a hog is wanted and not installed."""
        manifest = read_manifest(package)
        template = ChatTemplate.from_json((package / CHAT).read_bytes())
        if settings.hog and not shutil.which(HOG[0]):
            raise InvalidInput(f"{HOG[0]} is not installed (Debian: apt install {HOG[0]})")
        self._package, self._settings = package, settings
        self._judged = is_demo(manifest)
        self._vision = manifest.spec.vision is not None
        self._mix = kinds(vision=self._vision, thinking=template.generation_thinking != template.generation)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Returns once the daemon has heard of everything. Raises Unavailable where that takes too long."""
        with self._stack:
            self._start()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def calibrate(self) -> Calibration:
        """What asks take, one after the other. Comes before the loads. Raises Unavailable where none is answered."""
        self._found = self._runner.run(self._calibrate())
        return self._found

    def duration_s(self, load: float) -> float:
        """How long that will take, about."""
        return (1 + self._settings.baseline) * self._settings.asks * self._found.service_s / load

    def load(self, load: float) -> tuple[LoadScore, list[Asked]]:
        """Offer this much work, as a part of what can be done. Raises Unavailable where daemon or home has ended."""
        settings, found = self._settings, self._found
        rate_hz = load / found.service_s
        rng = random.Random(f"{settings.seed} {load}")
        coming = arrivals(rng, rate_hz, found.budgets_s, self._mix, again=settings.check_refused)
        offered = list(islice(coming, settings.asks))
        hog_s = (offered[-1].at_s / 3, 2 * offered[-1].at_s / 3) if settings.hog else None
        asked = self._runner.run(self._offer(offered, hog_s))
        costs = self._client.status().engine.costs
        cut = self._runner.run(self._offer(offered, hog_s, cut=True)) if settings.baseline else []
        figures = score(
            asked,
            load=load,
            rate_hz=rate_hz,
            step_s=found.step_s,
            budgets_s=found.budgets_s,
            costs=costs,
            cut=cut,
            hog_s=hog_s,
        )
        return figures, asked

    def _start(self) -> None:
        enter, settings = self._stack.enter_context, self._settings
        broker = enter(embedded_broker())
        address = broker.host, broker.port
        sections: dict[str, Any] = {"model": {"threads": settings.threads}, **(DEMO_SECTIONS if self._judged else {})}
        self._daemon, target = enter(home_daemon(self._package, address, node="bench", start_s=START_S, **sections))
        client = self._client = enter(Client(target))
        wait_for("connection to the broker", lambda: (link := client.status().link) and link.connected)
        frame_hz = settings.frame_hz if self._vision else 0.0
        home = self._home = enter(
            HomeProcess(*address, seed=settings.seed, rate_hz=settings.rate_hz, frame_hz=frame_hz, speed=SPEED)
        )
        wait_for("word from every device", lambda: home.question(settings.seed, ["missing"], FORMS))
        if self._vision:
            wait_for("frame of the camera", lambda: client.status().engine.cameras)
        runner = self._runner = enter(asyncio.Runner())
        self._async_client = runner.run(_connected(target))
        self._stack.callback(lambda: runner.run(self._async_client.close()))

    async def _calibrate(self) -> Calibration:
        rng = random.Random(self._settings.seed)
        (talk,) = (kind for kind in self._mix if kind.name == "sentence")
        talk = replace(talk, max_tokens=(CALIBRATION_TOKENS, CALIBRATION_TOKENS))
        answered = [await self._ask_one(talk, rng) for _ in range(CALIBRATION_ASKS)]
        first_s = [asked.first_s for asked in answered if asked.first_s is not None]
        steps_s = [
            (asked.end_s - asked.first_s) / (asked.usage.generation_tokens - 1)
            for asked in answered
            if asked.first_s is not None and asked.usage and asked.usage.generation_tokens > 1
        ]
        if not steps_s:
            raise Unavailable(f"{self._package} does not answer: {answered[0].error or 'there is no text'}")
        step_s = statistics.median(steps_s)
        budgets_s = self._settings.budgets_s or budgets_for(step_s)
        mean_s = mean_service_s(await self._services_s(rng, budgets_s[1]), budgets_s)
        return Calibration(statistics.median(first_s), step_s, budgets_s, mean_s, self._vision, self._judged)

    async def _services_s(self, rng: random.Random, most_s: float) -> dict[Kind, list[float]]:
        """What asks of each kind take, at most so long, one after the other."""
        took_s: dict[Kind, list[float]] = {kind: [] for kind in self._mix}
        began_s = time.monotonic()
        for _ in range(SERVICE_ASKS):
            for kind, times in took_s.items():
                times.append(await self._service_s(kind, rng, most_s))
            if time.monotonic() - began_s > SERVICE_S:
                break
        return took_s

    async def _service_s(self, kind: Kind, rng: random.Random, most_s: float) -> float:
        """What one ask of a kind takes the daemon; it is given up after most_s."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                asked = await self._ask_one(kind, rng)
                return asked.timings.total_s if asked.timings else most_s
        return most_s

    async def _ask_one(self, kind: Kind, rng: random.Random) -> Asked:
        """Ask with time enough, now."""
        (arrival,) = islice(arrivals(rng, 1.0, (AMPLE_S, AMPLE_S), [kind]), 1)
        question, _ = await self._question(arrival)
        return await ask(self._async_client, arrival, question, due_s=time.monotonic())

    async def _offer(
        self, offered: Sequence[Arrival], hog_s: tuple[float, float] | None, *, cut: bool = False
    ) -> list[Asked]:
        """Send each ask when it is due. cut: see `ask`. Raises Unavailable where the daemon or the home has ended."""
        try:
            with _undisturbed():
                async with asyncio.TaskGroup() as group:
                    began_s = time.monotonic() + LEAD_S
                    sent = [group.create_task(self._send(arrival, began_s + arrival.at_s, cut)) for arrival in offered]
                    if hog_s:
                        group.create_task(_hog(began_s, *hog_s))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from failed
        self._daemon.check()
        return [judge(*task.result()) for task in sent]

    async def _send(self, arrival: Arrival, due_s: float, cut: bool) -> tuple[Asked, Question | None]:
        await _until(due_s - PREPARE_S)
        question, truth = await self._question(arrival)
        await _until(due_s)
        return await ask(self._async_client, arrival, question, due_s=due_s, cut=cut), truth

    async def _question(self, arrival: Arrival) -> tuple[str, Question | None]:
        """What to ask, and the question that its answer can be judged by, where there is one."""
        kind = arrival.kind
        question = await asyncio.to_thread(self._home.question, arrival.seed, kind.subjects, kind.forms)
        if question is None:
            return kind.plain, None
        return question.text, question if self._judged and kind.judged else None


async def _connected(target: str) -> AsyncClient:
    """Made in the loop that it is used in."""
    return AsyncClient(target)


async def _until(time_s: float) -> None:
    if (left_s := time_s - time.monotonic()) > 0:
        await asyncio.sleep(left_s)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Without the garbage collector, which takes tens of milliseconds for all that is imported."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


async def _hog(began_s: float, from_s: float, to_s: float) -> None:
    """All cores are busy between these times, which count from began_s."""
    await _until(began_s + from_s)
    quiet = asyncio.subprocess.DEVNULL
    hog = await asyncio.create_subprocess_exec(*HOG, stdout=quiet, stderr=quiet)
    try:
        await _until(began_s + to_s)
    finally:
        hog.terminate()
        await hog.wait()
