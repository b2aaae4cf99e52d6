"""How well a daemon keeps budgets, measured at a client over loopback gRPC while it reads a simulated home.

Asks arrive whether or not earlier ones have been answered, as those of many clients do.
"""

import asyncio
import contextlib
import gc
import json
import random
import re
import shutil
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from iotd.client import AskOptions, AsyncAnswerStream, AsyncClient, Client
from iotd.demo import simulate
from iotd.demo.arrivals import ROOM_SCHEMA, SENTENCE_REGEX, YES_NO, Arrival, Kind, arrivals, budgets_for, kinds
from iotd.demo.arrivals import mean_service_s as mean_of
from iotd.demo.broker import embedded_broker
from iotd.demo.budget_score import Again, Asked, LoadScore, has_sentence, score
from iotd.demo.daemon import DEMO_SECTIONS, START_S, home_daemon, wait_for
from iotd.demo.ledger import Ledger
from iotd.demo.package import is_demo
from iotd.demo.questions import Question
from iotd.errors import DeadlineExceeded, InvalidInput, IotdError
from iotd.model.chat import ChatTemplate
from iotd.model.package import CHAT, read_manifest

AMPLE_S = 60.0
"""A budget that is not felt."""
CALIBRATION_ASKS = 8
SERVICE_ASKS = 4
"""Of each kind, to find what the mix takes."""
CUT_TOKENS = 16
"""Of an answer in words, where a fixed cut stands in a plan's place."""
DRAWS = 6
"""Tries for a question whose answer is settled."""
PREPARE_S = 0.02
"""The question of an ask is drawn so long before it is due, as that takes a millisecond."""
LEAD_S = 0.2
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
    thinking: bool
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
        self._thinking = template.generation_thinking != template.generation
        self._mix = kinds(vision=self._vision, thinking=self._thinking)
        self._ledger = Ledger(camera=self._vision)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Returns once the daemon has read something of everything. Raises Unavailable where that takes too long."""
        with self._stack:
            self._start()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def calibrate(self) -> Calibration:
        """What an ask takes, one after the other. Comes before the loads."""
        self.calibration = self._runner.run(self._calibrate())
        return self.calibration

    def load(self, load: float) -> tuple[LoadScore, list[Asked]]:
        """Offer this much work, as a part of what can be done.

        Raises Unavailable where the daemon or the home has ended.
        """
        settings, found = self._settings, self.calibration
        rate_hz = load / found.service_s
        rng = random.Random(f"{settings.seed} {load}")
        coming = arrivals(rng, rate_hz, found.budgets_s, self._mix, again=settings.check_refused)
        offered = list(islice(coming, settings.asks))
        last_s = offered[-1].at_s
        hog_s = (last_s / 3, 2 * last_s / 3) if settings.hog else None
        asked = self._runner.run(self._offer(offered, hog_s))
        self._check()
        costs = self._client.status().engine.costs
        cut: list[Asked] = []
        if settings.baseline:
            judged = [replace(each, again=False) for each in offered]
            cut = self._runner.run(self._offer(judged, hog_s, cut=True))
        self._check()
        return (
            score(
                asked,
                load=load,
                rate_hz=rate_hz,
                step_s=found.step_s,
                budgets_s=found.budgets_s,
                costs=costs,
                cut=cut,
                hog_s=hog_s,
            ),
            asked,
        )

    def _start(self) -> None:
        enter, settings = self._stack.enter_context, self._settings
        broker = enter(embedded_broker())
        sections: dict[str, Any] = {"model": {"threads": settings.threads}, **(DEMO_SECTIONS if self._judged else {})}
        address = broker.host, broker.port
        self._daemon, target = enter(home_daemon(self._package, address, node="bench", start_s=START_S, **sections))
        client = self._client = enter(Client(target))
        wait_for("connection to the broker", lambda: (link := client.status().link) and link.connected)
        self._home = enter(
            simulate.running(
                *address,
                seed=settings.seed,
                rate_hz=settings.rate_hz,
                frame_hz=settings.frame_hz if self._vision else 0.0,
                speed=SPEED,
                lived_in=True,
                tell=self._ledger.tell,
            )
        )
        rng = random.Random(settings.seed)
        wait_for("settled answer", partial(self._ledger.question, rng, ["value"]))
        if self._vision:
            wait_for("frame read", lambda: client.status().engine.counters.get("frames_read"))
        runner = self._runner = enter(asyncio.Runner())
        self._async_client = runner.run(_connected(target))
        self._stack.callback(lambda: runner.run(self._async_client.close()))

    def _check(self) -> None:
        """Raises IotdError where the daemon or the home has ended."""
        self._daemon.check()
        if self._home.done():
            self._home.result()

    async def _calibrate(self) -> Calibration:
        rng = random.Random(self._settings.seed)
        (talk,) = (kind for kind in self._mix if kind.name == "long")
        first_s, step_s = [], []
        for arrival in islice(arrivals(rng, 1.0, (AMPLE_S, AMPLE_S), [talk]), CALIBRATION_ASKS):
            asked = await self._answered(arrival)
            if asked.first_s is not None and asked.usage and asked.usage.generation_tokens > 1:
                first_s.append(asked.first_s)
                step_s.append((asked.end_s - asked.first_s) / (asked.usage.generation_tokens - 1))
        if not step_s:
            raise InvalidInput(f"{self._package} has answered {CALIBRATION_ASKS} questions with a token at most")
        step = statistics.median(step_s)
        budgets_s = self._settings.budgets_s or budgets_for(step)
        took_s = {
            kind: [await self._service_s(kind, rng, budgets_s[1]) for _ in range(SERVICE_ASKS)] for kind in self._mix
        }
        return Calibration(
            statistics.median(first_s),
            step,
            budgets_s,
            mean_of(took_s, budgets_s),
            self._vision,
            self._thinking,
            self._judged,
        )

    async def _service_s(self, kind: Kind, rng: random.Random, most_s: float) -> float:
        """What one ask of a kind takes the daemon; it is given up after most_s."""
        (arrival,) = islice(arrivals(rng, 1.0, (AMPLE_S, AMPLE_S), [kind]), 1)
        try:
            async with asyncio.timeout(most_s):
                asked = await self._answered(arrival)
        except TimeoutError:
            return most_s
        return asked.timings.total_s if asked.timings else asked.end_s

    async def _answered(self, arrival: Arrival) -> Asked:
        """Ask now. Raises IotdError where that fails."""
        question, _ = self._question(arrival)
        asked = _unasked(arrival, question)
        stream = self._async_client.ask(question, **_options(arrival, arrival.budget_s))
        await _follow(stream, asked, time.monotonic())
        return asked

    async def _offer(
        self, offered: Sequence[Arrival], hog_s: tuple[float, float] | None, *, cut: bool = False
    ) -> list[Asked]:
        """Send each ask when it is due.

        cut: answers in words are cut at a fixed number of tokens; the client alone knows the budget, and hangs up.
        """
        found: list[tuple[Asked, Question | None]] = []
        async with _undisturbed(), asyncio.TaskGroup() as group:
            began_s = time.monotonic() + LEAD_S
            hog = group.create_task(_hog(began_s, *hog_s)) if hog_s else None
            for arrival in offered:
                due_s = began_s + arrival.at_s
                await _until(due_s - PREPARE_S)
                question, truth = self._question(arrival)
                asked = _unasked(arrival, question)
                found.append((asked, truth))
                await _until(due_s)
                group.create_task(self._send(arrival, asked, due_s, cut))
            if hog:
                await hog
        return [_judged(asked, truth) for asked, truth in found]

    async def _send(self, arrival: Arrival, asked: Asked, due_s: float, cut: bool) -> None:
        options = _options(arrival, AMPLE_S if cut else arrival.budget_s)
        if cut and arrival.kind.form == "free":
            options["max_tokens"] = min(CUT_TOKENS, arrival.max_tokens)
        sent_s = time.monotonic()
        asked.lag_s = sent_s - due_s
        try:
            async with asyncio.timeout(arrival.budget_s if cut else None):
                await _follow(self._async_client.ask(asked.question, **options), asked, sent_s)
        except IotdError as error:
            asked.error, asked.needed_s = error.code, getattr(error, "needed_s", None)
        except TimeoutError:
            asked.error = DeadlineExceeded.code
        if asked.error:
            asked.end_s = time.monotonic() - sent_s
        if asked.refused and arrival.again:
            asked.again = await self._again(arrival, asked.question, sent_s + arrival.budget_s)

    async def _again(self, arrival: Arrival, question: str, ends_s: float) -> Again:
        """Send a refused ask again, and see what has come of it by its first deadline."""
        found, text = Again(), ""
        with contextlib.suppress(IotdError, TimeoutError):
            async with asyncio.timeout(ends_s - time.monotonic()):
                async for piece in self._async_client.ask(question, **_options(arrival, AMPLE_S)):
                    found.pieces += 1
                    text += piece
                found.whole = True
        found.sentence = has_sentence(text)
        return found

    def _question(self, arrival: Arrival) -> tuple[str, Question | None]:
        """What to ask, and the question that its answer can be judged by, where there is one."""
        kind, rng = arrival.kind, random.Random(arrival.seed)
        for _ in range(DRAWS):
            if question := self._ledger.question(rng, kind.subjects, kind.forms):
                return question.text, question if self._judged and kind.judged else None
        return kind.plain, None


async def _connected(target: str) -> AsyncClient:
    """Made in the loop that it is used in."""
    return AsyncClient(target)


def _options(arrival: Arrival, budget_s: float) -> AskOptions:
    return {"budget_s": budget_s, "max_tokens": arrival.max_tokens, **arrival.kind.options}


def _unasked(arrival: Arrival, question: str) -> Asked:
    kind = arrival.kind
    return Asked(kind.name, kind.form, question, arrival.budget_s, arrival.max_tokens, arrival.at_s)


async def _follow(stream: AsyncAnswerStream, asked: Asked, sent_s: float) -> None:
    """Fill in what comes of an ask. Raises IotdError where it fails."""
    try:
        async for _ in stream:
            if asked.first_s is None:
                asked.first_s = time.monotonic() - sent_s
        answer = stream.result
        asked.end_s = stream.done_s - sent_s
        asked.text, asked.finish_reason, asked.usage, asked.timings = (
            answer.text,
            answer.finish_reason,
            answer.usage,
            answer.timings,
        )
    finally:
        if accepted := stream.accepted:
            asked.accepted_s = stream.accepted_s - sent_s
            asked.request_id, asked.queue_position = accepted.request_id, accepted.queue_position
            asked.plan = accepted.plan


def _judged(asked: Asked, truth: Question | None) -> Asked:
    """Afterwards, when there is time."""
    answer = asked.text.rpartition("</think>")[2].strip()
    ended_well = not asked.error
    if truth is not None:
        asked.right = ended_well and truth.right(answer)
    if asked.form != "free" and ended_well:
        asked.valid = _VALID[asked.form](answer)
    return asked


def _follows_schema(answer: str) -> bool:
    from jsonschema import Draft202012Validator

    try:
        return bool(Draft202012Validator(ROOM_SCHEMA).is_valid(json.loads(answer)))
    except ValueError:
        return False


_VALID: dict[str, Callable[[str], bool]] = {
    "choices": lambda answer: answer in YES_NO,
    "json_schema": _follows_schema,
    "regex": lambda answer: re.fullmatch(SENTENCE_REGEX, answer) is not None,
}


async def _until(time_s: float) -> None:
    if (left_s := time_s - time.monotonic()) > 0:
        await asyncio.sleep(left_s)


@contextlib.asynccontextmanager
async def _undisturbed() -> AsyncIterator[None]:
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
    """All cores are busy between these times."""
    await _until(began_s + from_s)
    hog = await asyncio.create_subprocess_exec(
        *HOG, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        await _until(began_s + to_s)
    finally:
        hog.terminate()
        await hog.wait()
