"""Who is asked in an evaluation: a package directly, a running daemon, or daemons started for it.

The same question over the same stream has the same answer: the likeliest one, or what a seed draws as daemons draw by
default.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from iotd.address import split_address
from iotd.client import AskOptions, Client
from iotd.config import DEFAULT_SYSTEM, AskConfig
from iotd.demo.broker import embedded_broker
from iotd.demo.daemon import home_daemon
from iotd.demo.devices import CAMERA_TOPIC
from iotd.demo.examples import Heard, Seen
from iotd.demo.scene import jpeg
from iotd.engine.backlog import Shot
from iotd.engine.entry import Entry, Part, Rows, chunks
from iotd.engine.feed import Floats, Ints, encode, feed
from iotd.engine.lines import Lines
from iotd.errors import InvalidInput, Unavailable
from iotd.events import Labels, Reading, Sampling, ServerStatus
from iotd.model import Model, State
from iotd.model.head import HeadChoice
from iotd.model.package import read_manifest
from iotd.mqtt.publisher import Publisher

MAX_TOKENS = 64
"""Of an answer; the longest that is expected has fewer."""
CAPACITY = 4096
"""Of a state, for the stream of one home with a question and its answer."""
CHUNK_TOKENS = 256
BUDGET_S = 120.0
"""Of an ask: time is not what is judged here."""
READ_S = 60.0
"""How long a daemon may take to read one event."""
START_S = 120.0
_PROBE_TOPIC = "home/message/eval"


class PackageRespondent:
    """The model of a package in this process: one state reads the stream, each question runs on a fork of it."""

    def __init__(
        self, package: Path, threads: int, head: HeadChoice = "exact", max_image_pixels: int | None = None
    ) -> None:
        """Raises PackageError where it cannot be opened, InvalidInput where it cannot see."""
        self._model = Model.open(package, threads=threads, head=head, max_image_pixels=max_image_pixels)
        if not self._model.has_vision:
            raise InvalidInput(f"{package} was converted without vision, and there are questions about pictures")
        capacity = min(CAPACITY, self._model.spec.max_positions)
        self._lines = Lines(self._model, max_tokens=capacity // 4)
        self._live, self._fork = self._model.new_state(capacity), self._model.new_state(capacity)
        self._day = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self) -> None:
        self._live.reset()
        self._day = ""
        self._feed(self._live, [self._lines.opening(DEFAULT_SYSTEM)])

    def read(self, event: Heard | Seen) -> None:
        entry = self._entry(event)
        date = [self._lines.date(entry.day)] if entry.day != self._day else []
        self._day = entry.day
        self._feed(self._live, [*date, *entry.parts])

    def answer(self, question: str, seed: int | None = None) -> str:
        generation = self._model.generation(self._fork, self._ask(question), _sampling(seed))
        text = ""
        while not generation.done:
            text += generation.step().answer
        return text + generation.flush().answer

    def weigh(self, question: str, labels: Sequence[str]) -> list[float]:
        logits = self._ask(question, only=self._model.every_token)
        paths = self._model.label_paths(labels)
        weighing = self._model.weighing(self._fork, logits, Labels(tuple(labels)), paths)
        while not weighing.done:
            weighing.step()
        return [score.log_probability for score in weighing.result().labels]

    def _ask(self, question: str, only: Ints | None = None) -> Floats:
        """Read it on the fork. Returns float32 [V] after its last token."""
        self._live.copy_into(self._fork)
        logits = self._feed(self._fork, self._lines.question(question, (), thinking=False), logits=True, only=only)
        assert logits is not None
        return logits

    def _entry(self, event: Heard | Seen) -> Entry:
        observation = event.observation()
        if isinstance(observation, Reading):
            return self._lines.reading(observation)[0]
        return self._lines.frame(Shot(observation.camera, observation.time_s, observation.rgb))

    def _feed(
        self, state: State, parts: list[Part], *, logits: bool = False, only: Ints | None = None
    ) -> Floats | None:
        """Read it all. Returns float32 [V] after the last token, where it is asked for; `only` is as in `feed`."""
        found: Floats | None = None
        for chunk in chunks(parts, lambda: CHUNK_TOKENS):
            if isinstance(chunk, Rows) and chunk.image.embedding is None:
                encode(self._model, chunk.image)
            found = feed(self._model, state, chunk, logits=logits, only=only)
        return found


class DaemonRespondent:
    """A running daemon that reads the demo's home from a broker: events go through MQTT, questions through gRPC.

    Its context stays what it is when a home begins.
    """

    def __init__(self, target: str, broker: str) -> None:
        """target, broker: HOST:PORT. Raises InvalidInput where one is none."""
        self._target, self._broker = target, broker
        self._client = Client(target)
        try:
            self._publisher = Publisher(*split_address(broker))
        except ValueError as e:
            raise InvalidInput(f"the broker is {broker!r}: it must be HOST:PORT, such as 127.0.0.1:1883") from e

    def __enter__(self) -> Self:
        """Raises Unavailable where the daemon or the broker is not there, or the one does not read the other."""
        with ExitStack() as stack:
            stack.enter_context(self._client)
            self._client.status()
            stack.enter_context(self._publisher)
            self._wait_subscribed()
            self._opened = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    def begin(self) -> None:
        pass

    def read(self, event: Heard | Seen) -> None:
        """One event at a time, so that none is dropped and all come in their order."""
        topic, payload = _message(event)
        before_s = self._client.status().engine.newest_event_s
        self._publish(topic, payload)
        self._wait(
            lambda status: status.engine.newest_event_s != before_s and not status.engine.backlog,
            f"the daemon at {self._target} has not read {topic} within {READ_S:g} s",
        )

    def answer(self, question: str, seed: int | None = None) -> str:
        options: AskOptions = {"budget_s": BUDGET_S, "max_tokens": MAX_TOKENS}
        options |= {"temperature": 0.0, "presence_penalty": 0.0} if seed is None else {"seed": seed}
        return self._client.answer(question, **options).text

    def weigh(self, question: str, labels: Sequence[str]) -> list[float]:
        found = self._client.classify(question, labels, budget_s=BUDGET_S)
        return [found.log_probabilities[label] for label in labels]

    def _wait_subscribed(self) -> None:
        """Send what is counted and not read, until it arrives."""
        before = _n_messages(self._client.status())

        def arrived(status: ServerStatus) -> bool:
            self._publish(_PROBE_TOPIC, "")
            return _n_messages(status) > before

        self._wait(
            arrived,
            f"the daemon at {self._target} hears nothing of what is sent to {self._broker}: it must be connected to "
            f"that broker and subscribe to the demo's topics, such as {_PROBE_TOPIC}",
        )

    def _publish(self, topic: str, payload: str | bytes) -> None:
        if not self._publisher.publish(topic, payload):
            raise Unavailable(f"the broker at {self._broker} went away")

    def _wait(self, true: Callable[[ServerStatus], bool], otherwise: str) -> None:
        """Look at the daemon's status until it shows what is waited for."""
        end_s = time.monotonic() + READ_S
        while not true(self._client.status()):
            if time.monotonic() > end_s:
                raise Unavailable(otherwise)
            time.sleep(0.005)


class FreshDaemonRespondent:
    """A broker, and a daemon of its own for each home."""

    def __init__(self, package: Path, threads: int, restart_every: int = 0) -> None:
        """restart_every: the daemon is stopped, and goes on from its snapshot, before each so many-th question.

        Raises PackageError where the package cannot be opened.
        """
        read_manifest(package)
        self._package, self._threads = package, threads
        self._restart_every, self._n_asked = restart_every, 0
        self._stack, self._home = ExitStack(), ExitStack()

    def __enter__(self) -> Self:
        broker = self._stack.enter_context(embedded_broker())
        self._broker = broker.host, broker.port
        if self._restart_every:
            self._snapshot = Path(self._stack.enter_context(TemporaryDirectory())) / "context.snapshot"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            self._home.close()

    def begin(self) -> None:
        """Raises Unavailable where the daemon does not start."""
        self._home.close()
        if self._restart_every:
            self._snapshot.unlink(missing_ok=True)
        self._start()

    def _start(self) -> None:
        sections: dict[str, dict[str, object]] = {"model": {"threads": self._threads}}
        if self._restart_every:
            sections["snapshot"] = {"path": str(self._snapshot)}
        with ExitStack() as stack:
            _, target = stack.enter_context(
                home_daemon(self._package, self._broker, node="eval", start_s=START_S, **sections)
            )
            host, port = self._broker
            self._respondent = stack.enter_context(DaemonRespondent(target, f"{host}:{port}"))
            self._home = stack.pop_all()

    def read(self, event: Heard | Seen) -> None:
        self._respondent.read(event)

    def answer(self, question: str, seed: int | None = None) -> str:
        self._n_asked += 1
        if self._restart_every and self._n_asked % self._restart_every == 0:
            self._home.close()
            self._start()
        return self._respondent.answer(question, seed)

    def weigh(self, question: str, labels: Sequence[str]) -> list[float]:
        return self._respondent.weigh(question, labels)


def _sampling(seed: int | None) -> Sampling:
    """Of the likeliest answer; with a seed, as a daemon answers an ask that brings no more than that."""
    if seed is None:
        return Sampling(temperature=0.0, max_tokens=MAX_TOKENS)
    defaults = AskConfig()
    return Sampling(defaults.temperature, presence_penalty=defaults.presence_penalty, seed=seed, max_tokens=MAX_TOKENS)


def _message(event: Heard | Seen) -> tuple[str, str | bytes]:
    """Topic and payload, as the device sends it."""
    if isinstance(event, Seen):
        return CAMERA_TOPIC, jpeg(event.scene.rgb)
    return event.report.topic, event.report.payload


def _n_messages(status: ServerStatus) -> int:
    return status.link.counters.get("messages", 0) if status.link else 0
