"""The engine: one thread that owns the model, reading the stream in idle time and answering asks inside their budgets.

Everything else talks to it through `observe` and `submit`, which never block. Knows no broker and no RPC.
"""

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import asdict

import msgspec

from iotd.config import AskConfig, ContextConfig
from iotd.counters import Counters
from iotd.engine.answer import Kit
from iotd.engine.asks import Asks
from iotd.engine.backlog import Backlog
from iotd.engine.calibrate import calibrate
from iotd.engine.call import Call, Sink, Ticket
from iotd.engine.context import Context
from iotd.engine.costs import Costs, Samples
from iotd.engine.ledger import Ledger
from iotd.engine.lengths import Lengths
from iotd.engine.lines import Lines
from iotd.engine.plan import Planner
from iotd.engine.prompt import Prompts
from iotd.engine.reader import Reader
from iotd.engine.saver import Saver, Write
from iotd.engine.sessions import Sessions
from iotd.engine.snapshot import Snapshot
from iotd.engine.worker import Worker
from iotd.errors import InvalidInput, NotFound, Overloaded, SnapshotError
from iotd.events import MAX_CAMERAS, Accepted, Answered, Ask, CostStatus, EngineStatus, Frame, Observation, Reading
from iotd.model import Model

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
"""An idle engine shows that it lives this often."""
SAVE_S = 30.0
"""How long a stop waits for a save under way."""
JOIN_S = 30.0
"""How long a stop waits for the unit of work in hand."""
FORKS = 2
"""States without rows of their own: the one that answers run on, and one beside it, for drafts and long labels."""
COUNTS = (
    "asks",
    "asks_stop",
    "asks_length",
    "asks_preempted",
    "asks_budget",
    "asks_cancelled",
    "asks_expired",
    "asks_failed",
    "asks_refused",
    "asks_rejected",
    "asks_repetition",
    "coalesced_readings",
    "context_swaps",
    "context_tokens_read",
    "cut_readings",
    "defects",
    "dropped_frames",
    "dropped_readings",
    "forgotten_cameras",
    "forgotten_sensors",
    "frames",
    "frames_read",
    "generation_tokens",
    "images_encoded",
    "lost_events",
    "prompt_tokens",
    "readings",
    "readings_read",
    "refused_frames",
    "sessions_dropped",
    "sessions_opened",
    "snapshots_failed",
    "snapshots_refused",
    "snapshots_restored",
    "snapshots_saved",
)
"""Everything the engine counts."""
EVENT_PART = 4
"""One event takes at most one part in so many of the window."""


class Engine:
    """A model, its warm context, and the asks over it.

    Sinks are called on the engine's own threads, for one ask never two at once: Delta*, then one Done or Failed. They
    must not block. One thread runs the model; a second only watches deadlines, so that an ask which has said nothing
    yet fails on time while the model is inside a long unit of work, such as encoding an image.
    """

    def __init__(
        self,
        model: Model,
        context: ContextConfig,
        ask: AskConfig,
        clock: Callable[[], float] = time.monotonic,
        on_answer: Callable[[Answered], None] | None = None,
    ) -> None:
        """Allocate all the state there will be, but for sessions. on_answer: told how each ask ended; must not block.

        Raises ConfigError where the system prompt is too long.
        """
        self._model = model
        self._window = context.window
        self._clock = clock
        self._drafting = ask.drafting
        self._counters = Counters(COUNTS)
        self._backlog = Backlog(context.backlog, MAX_CAMERAS, self._counters)
        self._chunk_tokens = chunk_tokens = min(context.chunk_tokens, context.window // 4)
        self.costs = Costs(clock)
        """What work takes here; learnt as it runs."""
        lengths = Lengths()
        planner = Planner(self.costs, lengths, chunk_tokens)
        self._asks = Asks(ask.queue, planner, self.costs, self._counters, on_answer)
        lines = self._lines = Lines(model, max_tokens=context.window // EVENT_PART)
        self._context = Context(
            model,
            lines,
            system=context.system,
            window=context.window,
            reserve_tokens=ask.reserve_tokens,
            costs=self.costs,
            chunk_tokens=chunk_tokens,
            chunk_s=context.chunk_s,
            counters=self._counters,
        )
        self._fork = model.new_state(0)
        self._ledger = Ledger(self._counters)
        live = self._context.live
        self._sessions = Sessions(
            lambda: model.new_state(live.capacity), live.nbytes, ask.session_bytes, self._counters
        )
        reader = Reader(self._backlog, lines, self._context, chunk_tokens, self._counters)
        self._prompts = Prompts(
            model=model,
            lines=lines,
            context=self._context,
            backlog=self._backlog,
            ledger=self._ledger,
            sessions=self._sessions,
            image_tokens=ask.reserve_tokens // 2,
            tell_length=ask.tell_length,
        )
        kit = Kit(
            model=model,
            prompts=self._prompts,
            planner=planner,
            costs=self.costs,
            lengths=lengths,
            fork=self._fork,
            drafting=ask.drafting,
            chunk_tokens=chunk_tokens,
            ends_s=self._asks.ends_s,
            clock=clock,
            counters=self._counters,
        )
        self._work = threading.Event()
        self._saver = Saver(self._context, self._counters, self._work.set)
        self._worker = Worker(self._asks, reader, self._saver, kit)
        self._refusals_s: deque[float] = deque(maxlen=100)
        self._restored = False
        self._alarm = threading.Event()
        self._opened = threading.Event()
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._progress_s = clock()
        self._threads = [
            threading.Thread(target=self._run, name="iotd-engine", daemon=True),
            threading.Thread(target=self._watch_deadlines, name="iotd-deadlines", daemon=True),
        ]

    @property
    def fingerprint(self) -> str:
        """Of the model's package."""
        return self._model.fingerprint

    def recall(self, samples: dict[str, Samples]) -> None:
        """Before `start`: what was measured earlier, as `costs.pack` gave it. Anything else is measured again."""
        try:
            self.costs.unpack(samples)
        except ValueError as error:
            log.warning("what work takes here is measured again: %s", error)

    def restore(self, snapshot: Callable[[], Snapshot | None]) -> None:
        """Before `start`: go on from a snapshot, if there is one. One that cannot be used is counted."""
        try:
            found = snapshot()
            if found is None:
                return
            self._context.restore(found)
            self._sessions.unpack(found.header.sessions, self._context.n_read, found.arrays)
        except SnapshotError as error:
            self._counters.add("snapshots_refused")
            log.warning("the context begins empty, as its snapshot cannot be used: %s", error)
        else:
            self._counters.add("snapshots_restored")
            self._restored = True
            view = self._context.view
            log.info("context restored", extra={"tokens": view.n_tokens, "age_s": round(time.time() - view.newest_s)})

    def save(self, write: Write) -> None:
        """Save the context soon, from any thread. Reading waits while it is written, asks do not."""
        self._saver.ask(write)
        self._work.set()

    def start(self) -> None:
        """Start, read the system prompt, and return when asks are accepted. Raises what reading it raised."""
        for thread in self._threads:
            thread.start()
        self._opened.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self, drain_s: float = 5.0, write: Write | None = None) -> None:
        """Refuse new asks, finish the others within `drain_s` seconds, fail the rest as Unavailable, save, end."""
        self._asks.drain()
        if not self._asks.wait_idle(drain_s if self._opened.is_set() else 0):
            log.warning("stopping with %d asks unanswered", self._asks.depth)
        self._stopping.set()
        self._alarm.set()
        self._work.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(JOIN_S)
                if thread.is_alive():
                    log.error("the thread %s is still inside a unit of work and is left behind", thread.name)
                    write = None
        self._saver.finish(self._snapshot, write, SAVE_S)

    def _snapshot(self) -> Snapshot:
        """Everything there is, as views of it. The model's thread has ended."""
        snapshot = self._context.capture()
        arrays = {**snapshot.arrays}
        sessions = self._sessions.pack(self._context.n_read, arrays)
        return Snapshot(msgspec.structs.replace(snapshot.header, sessions=sessions), arrays)

    def least_window(self, camera: str) -> int:
        """The window from which on a camera's frames can be read, wide ones; 0 for a model that takes no images."""
        return EVENT_PART * self._lines.least_frame(camera) if self._model.has_vision else 0

    def observe(self, observation: Observation) -> None:
        """Take in a reading or a frame, from any thread. Never blocks; what has no room is dropped and counted."""
        if isinstance(observation, Frame) and not self._model.has_vision:
            self._backlog.turn_away(observation)
            return
        if isinstance(observation, Reading):
            self._ledger.hear(observation)
        self._backlog.put(observation)
        self._work.set()

    def reconfigure(self, ask: AskConfig) -> None:
        """A new length of the queue, for the asks that come from now on; nothing else here changes. From any thread."""
        self._asks.resize(ask.queue)

    def check_format(self, ask: Ask) -> None:
        """Compile the ask's format, if it has one, so that its turn need not. From any thread; takes up to a second.

        Raises InvalidInput, naming the field, for one that does not compile or whose answers do not fit.
        """
        if ask.format is not None:
            self._model.constraint(ask.format, ask.sampling.max_tokens)

    def submit(self, ask: Ask, sink: Sink) -> Ticket:
        """Queue an ask, from any thread; its answer's events go to `sink`.

        Raises InvalidInput (images without vision, a prompt that does not fit), NotFound (camera, session), Overloaded
        or Unavailable at once. What shows only when its turn comes arrives as Failed.
        """
        self._check(ask)
        # A session's rows are its own, and drafts and labels have a state beside: these stay until they have ended.
        preemptible = ask.session is None and ask.labels is None and not self._drafting
        call = Call(ask, self._prompts.work(ask), sink, secrets.token_hex(8), preemptible=preemptible)
        try:
            position = self._asks.admit(call, self._clock())
        except Overloaded as error:
            if error.needed_s is not None:
                self._refusals_s.append(self._clock() - ask.arrived_s)
            raise
        assert call.planned is not None
        accepted = Accepted(call.request_id, position, call.planned.plan)
        self._alarm.set()
        self._work.set()
        return Ticket(accepted, lambda: self._cancel(call))

    def cameras(self) -> list[str]:
        """The cameras an ask can name."""
        return [known.camera for known in self._backlog.cameras() if known.newest_s]

    def progress_s(self) -> float:
        """Seconds since the last completed unit of work or idle heartbeat: what a watchdog looks at."""
        return self._clock() - self._progress_s

    def status(self) -> EngineStatus:
        """What the engine is doing, from any thread."""
        view = self._context.view
        return EngineStatus(
            model=self._model.name,
            ready=self._asks.accepting,
            context_tokens=view.n_tokens,
            context_window=self._window,
            oldest_event_s=view.oldest_s,
            newest_event_s=view.newest_s,
            queue_depth=self._asks.depth,
            backlog=len(self._backlog),
            state_nbytes=self._context.nbytes + FORKS * self._fork.nbytes + self._sessions.nbytes,
            forks=self._asks.running,
            sessions=len(self._sessions),
            readings=self._ledger.heard(),
            cameras=tuple(self._backlog.cameras()),
            recent=tuple(self._asks.recent),
            counters=self._counters.snapshot(),
            costs=self._cost_status(),
        )

    def _cost_status(self) -> CostStatus:
        costs, position, errors = self.costs, self._context.view.n_tokens, self._asks.errors
        prefill_run_s = costs.read_s(0, position)
        return CostStatus(
            fork_s=costs.fork_s(),
            prefill_run_s=prefill_run_s,
            prefill_token_s=costs.read_s(1, position) - prefill_run_s,
            decode_token_s=costs.step_s(position),
            slow_decode_token_s=costs.step_s(position, slow=True),
            image_token_s=costs.image_s(64) / 64 if costs.image_seen else 0.0,
            predictions=len(errors),
            median_error=_part(errors, 0.5),
            high_error=_part(errors, 0.95),
            slow_refusal_s=_part(self._refusals_s, 0.99),
        )

    def _check(self, ask: Ask) -> None:
        """What only the engine can know; the ranges of a request are checked where it came in."""
        if ask.images and not self._model.has_vision:
            raise InvalidInput("this model has no vision", field="images")
        self._sessions.check(ask.session, ask.keep_session)
        if ask.camera is not None and self._backlog.newest(ask.camera) is None:
            known = ", ".join(sorted(self.cameras())) or "none so far"
            raise NotFound(f"no frame from a camera {ask.camera!r}; cameras heard: {known}")

    def _cancel(self, call: Call) -> None:
        call.cancelled = True
        self._alarm.set()

    def _run(self) -> None:
        try:
            if not self._restored:
                self._context.open()
            self._calibrate()
        except BaseException as failure:  # noqa: BLE001 - handed to the thread that called start()
            self._failure = failure
            self._stopping.set()
            self._alarm.set()
            self._opened.set()
            return
        self._asks.open()
        self._opened.set()
        while not self._stopping.is_set():
            self._work.clear()
            if not self._turn():
                self._work.wait(HEARTBEAT_S)
            self._progress_s = self._clock()

    def _calibrate(self) -> None:
        if not self.costs.known:
            live, chunk_tokens = self._context.live, self._chunk_tokens
            calibrate(self._model, live, self._fork, self.costs, chunk_tokens, self._clock)
            log.info("measured what work takes here", extra=self._told_costs())

    def _told_costs(self) -> dict[str, float]:
        told = asdict(self._cost_status()).items()
        return {name: round(value, 6) for name, value in told if name.endswith("_s") and value}

    def _turn(self) -> bool:
        try:
            return self._worker.turn()
        except Exception:
            log.exception("a unit of work failed outside of any ask or event")
            self._counters.add("defects")
            return False

    def _watch_deadlines(self) -> None:
        while not self._stopping.is_set():
            now_s = self._clock()
            self._alarm.wait(min(max(self._asks.next_deadline_s(now_s + HEARTBEAT_S) - now_s, 0), HEARTBEAT_S))
            self._alarm.clear()
            self._asks.settle(self._clock())
        self._asks.close()


def _part(values: Collection[float], part: float) -> float:
    """So large a part of them is no larger; 0 where there are none."""
    return sorted(values)[int(part * (len(values) - 1))] if values else 0.0
