"""The composition root: builds the parts, starts them, and stops them in order. Knows no command line.

The server is up before the model is loaded, so that health can say NOT_SERVING; the engine is attached later.
"""

import asyncio
import functools
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from iotd import __version__
from iotd.address import split_address
from iotd.config import Config
from iotd.engine import Engine, Snapshot
from iotd.errors import ConfigError, IotdError
from iotd.events import Answered, EngineStatus, ServerStatus
from iotd.ingest import decode_image
from iotd.model import Model
from iotd.mqtt import Link
from iotd.mqtt.probe import probe
from iotd.ops import board, logs, measured, preflight, snapshots
from iotd.ops.metrics import Metrics
from iotd.ops.systemd import Notifier
from iotd.rpc import Server
from iotd.rpc.listen import check as check_listen

log = logging.getLogger(__name__)

TICK_S = 1.0
PATIENCE_S = 60.0
"""Without a watchdog: an engine that makes no progress for this long is called stalled."""
LOADING_STEP_S = 5.0
DRAIN_S = 10.0
GRACE_S = 1.0
"""For the last events of drained answers to reach their clients."""

SWITCH_S = 0.0005
"""How long a thread that computes in Python keeps others waiting, such as the one that refuses asks: a tenth of
Python's default, under which a refusal took 5 ms at the median."""

Read = Callable[[], Config]


def serve(read: Read) -> int:
    """Run the daemon until a signal ends it. `read` gives the configuration, and again at every SIGHUP.

    Returns the exit code. Raises ConfigError where the first reading fails.
    """
    config = read()
    logs.setup(config.log)
    sys.setswitchinterval(SWITCH_S)
    daemon = Daemon(config, read)
    code = asyncio.run(daemon.run())
    if daemon.loading:
        # A model that is being opened cannot be interrupted, and the interpreter must not be torn down around it.
        logging.shutdown()
        os._exit(code)
    return code


def check(config: Config) -> Iterator[preflight.Finding]:
    """What would keep `serve` from working with this configuration, and what it would do."""
    look = functools.partial(open_engine, pack=False)
    return preflight.inspect(config, threads(config), model=look, listen=check_listen, broker=probe)


def threads(config: Config) -> int:
    """Compute threads: as configured, or all cores but one, at least 1 and at most 4."""
    return config.model.threads or max(1, min(4, board.cores() - 1))


def open_engine(config: Config, on_answer: Callable[[Answered], None] | None = None, *, pack: bool = True) -> Engine:
    """The configured model in an engine that has not started. on_answer: told how each ask ended.

    pack: see `Model.open`; it writes to the cache.
    Raises PackageError, or ConfigError naming the key.
    """
    settings = config.model
    model = Model.open(
        settings.path,
        threads=threads(config),
        spinning=settings.spinning,
        affinity=settings.affinity,
        max_image_pixels=settings.max_image_pixels,
        head=settings.head,
        pack=pack,
    )
    preflight.check_positions(config, model.spec)
    return Engine(model, config.context, config.ask, on_answer=on_answer)


class Daemon:
    """One running iotd. Its methods run on the event loop's thread, but for `_load`."""

    def __init__(self, config: Config, read: Read) -> None:
        """Raises ConfigError where the gRPC address or its TLS files cannot be used."""
        self._config = config
        self._read = read
        self._notifier = Notifier()
        self._started_s = time.monotonic()
        self._engine: Engine | None = None
        self._link: Link | None = None
        # Twice what the model looks at: enough for its own, finer resize, and little to keep for each camera and ask.
        self._keep_pixels = 2 * config.model.max_image_pixels
        decode = functools.partial(decode_image, max_pixels=config.mqtt.max_pixels, keep_pixels=self._keep_pixels)
        self._server = Server(None, self.status, config.grpc, ask=config.ask, decode_image=decode)
        self._metrics = Metrics(self.status, time.time)
        self._signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
        self._stopping = False
        self._stalled = False
        self._line = ""
        self._saved_s = 0.0
        self.loading = False
        """The loading thread still runs."""

    async def run(self) -> int:
        """Start, serve until SIGTERM or SIGINT, stop. Returns the exit code."""
        self._watch_signals()
        try:
            port = await self._server.start()
            if self._config.metrics.listen:
                log.info("metrics", extra={"http": self._metrics.start(*split_address(self._config.metrics.listen))})
            log.info("loading %s", self._config.model.path)
            engine = await self._loaded()
            if engine is not None:
                self._begin(engine, port)
                await self._serve(engine)
        except (IotdError, OSError) as e:
            log.error("iotd cannot start: %s", e)
            return 1
        finally:
            await self._shut_down()
        return 0

    def status(self) -> ServerStatus:
        """What GetStatus answers."""
        return ServerStatus(
            version=__version__,
            state=self._server.state,
            uptime_s=time.monotonic() - self._started_s,
            resident_nbytes=board.resident_nbytes(),
            temperature_c=board.temperature_c(),
            engine=self._engine.status() if self._engine else _not_loaded(self._config.context.window),
            link=self._link.status() if self._link else None,
        )

    def _watch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if number not in (signal.SIGHUP, signal.SIGUSR1):
            if self._stopping:
                log.warning("%s again: leaving at once", number.name)
                logging.shutdown()
                os._exit(128 + number)
            self._stopping = True
        self._signals.put_nowait(number)

    async def _loaded(self) -> Engine | None:
        """Load the model on a thread of its own. None where a stop came first; raises what loading raised."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Engine] = loop.create_future()
        self.loading = True
        threading.Thread(target=self._load, args=(loop, result), name="load", daemon=True).start()
        hangup = False
        while not result.done() and not self._stopping:
            self._notifier.extend(6 * LOADING_STEP_S)
            hangup |= await self._next_signal(LOADING_STEP_S, result) is signal.SIGHUP
        if hangup:
            self._signals.put_nowait(signal.SIGHUP)
        return result.result() if result.done() else None

    def _load(self, loop: asyncio.AbstractEventLoop, result: "asyncio.Future[Engine]") -> None:
        try:
            engine = open_engine(self._config, self._metrics.answered)
            kept = self._kept(engine)
            engine.recall(measured.load(*kept))
            known = engine.costs.known
            if self._config.snapshot.path:
                engine.restore(functools.partial(snapshots.load, Path(self._config.snapshot.path)))
            engine.start()
            if not known:
                measured.save(engine.costs.pack(), *kept)
        except BaseException as e:  # noqa: BLE001 - the edge of a thread: whoever waits for the result raises it again
            outcome = functools.partial(result.set_exception, e)
        else:
            outcome = functools.partial(result.set_result, engine)
        self.loading = False
        if not loop.is_closed():
            loop.call_soon_threadsafe(outcome)

    def _kept(self, engine: Engine) -> tuple[str, ...]:
        """What measurements of this engine depend on."""
        model = self._config.model
        return engine.fingerprint, str(threads(self._config)), str(model.spinning), str(model.affinity), model.head

    async def _next_signal(
        self, timeout_s: float, other: "asyncio.Future[Engine] | None" = None
    ) -> signal.Signals | None:
        """The next signal; None after `timeout_s` seconds, or once `other` is done."""
        waiting = asyncio.ensure_future(self._signals.get())
        awaited: set[asyncio.Future[Any]] = {waiting, other} if other else {waiting}
        await asyncio.wait(awaited, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        waiting.cancel()
        return None

    def _begin(self, engine: Engine, port: int) -> None:
        """Take readings and questions. Raises ConfigError where a file of the broker's settings cannot be read."""
        self._engine = engine
        # What is loaded by now stays: a full collection that looks through it all takes 15 ms, a late answer's worth.
        gc.collect()
        gc.freeze()
        board.give_back_memory()  # loading leaves some 40 MB of it
        mqtt, model, window = self._config.mqtt, engine.status().model, self._config.context.window
        if mqtt.host:
            self._link = Link(
                mqtt,
                engine.observe,
                answerer=self._server.service if mqtt.asks else None,
                version=__version__,
                info={"model": model, "window": window},
                keep_pixels=self._keep_pixels,
            )
            self._link.start()
        self._server.attach(engine)
        self._server.set_serving(True)
        self._line = self._describe(engine)
        self._notifier.ready(self._line)
        host = self._config.grpc.listen.rpartition(":")[0]
        broker = f"{mqtt.host}:{mqtt.port}" if mqtt.host else "none"
        log.info("ready", extra={"grpc": f"{host}:{port}", "broker": broker, "model": model, "window": window})

    async def _serve(self, engine: Engine) -> None:
        tick_s = min(TICK_S, self._notifier.watchdog_s / 4) if self._notifier.watchdog_s else TICK_S
        self._saved_s = time.monotonic()
        while not self._stopping:
            number = await self._next_signal(tick_s)
            if number is signal.SIGHUP:
                self._reload()
            if number is signal.SIGUSR1 or time.monotonic() - self._saved_s >= self._config.snapshot.interval_s:
                self._save(engine)
            self._tick(engine)

    def _save(self, engine: Engine) -> None:
        self._saved_s = time.monotonic()
        if (write := self._write()) is not None:
            engine.save(write)

    def _write(self) -> Callable[[Snapshot], None] | None:
        path = self._config.snapshot.path
        return functools.partial(snapshots.save, Path(path)) if path else None

    def _tick(self, engine: Engine) -> None:
        """Feed the watchdog and say what goes on; health follows the engine's progress."""
        idle_s = engine.progress_s()
        stalled = idle_s > (self._notifier.watchdog_s / 2 or PATIENCE_S)
        if not stalled:
            self._notifier.alive()
        if stalled != self._stalled:
            self._stalled = stalled
            self._server.set_health(not stalled)
            log.log(logging.ERROR if stalled else logging.INFO, "the engine %s", "stalls" if stalled else "moves again")
        line = f"stalled for {idle_s:.0f} s" if stalled else self._describe(engine)
        if line != self._line:
            self._line = line
            self._notifier.status(line)

    def _describe(self, engine: Engine) -> str:
        s = engine.status()
        line = f"context {s.context_tokens}/{s.context_window} tokens, {s.backlog} waiting; {s.queue_depth} asks"
        if self._link is None:
            return line
        return f"{line}; broker {'connected' if self._link.status().connected else 'away'}"

    def _reload(self) -> None:
        """Apply what can change while running; a configuration with errors changes nothing."""
        self._notifier.reloading()
        try:
            self._apply(self._read())
        except ConfigError as e:
            log.error("not reloaded, the configuration in use stays: %s", e)
        except Exception:  # a defect in reading a file must not end a daemon that works
            log.exception("not reloaded, the configuration in use stays")
        self._notifier.ready(self._line)

    def _apply(self, new: Config) -> None:
        old = self._config
        subscriptions = new.mqtt.subscriptions
        if self._link is not None and subscriptions != old.mqtt.subscriptions:
            self._link.reconfigure(subscriptions)
        # The states are allocated once, with the reserve in them; everything else of `ask` is a limit.
        ask = replace(new.ask, reserve_tokens=old.ask.reserve_tokens)
        self._config = replace(old, log=new.log, ask=ask, mqtt=replace(old.mqtt, subscriptions=subscriptions))
        logs.setup(new.log)
        self._server.reconfigure(ask)
        if self._engine is not None:
            self._engine.reconfigure(ask)
        pending = _differences(self._config, new)
        log.info("reloaded%s", f"; a restart is needed for {', '.join(pending)}" if pending else "")

    async def _shut_down(self) -> None:
        """Close the intake, drain, cancel, release. A second signal leaves at once, wherever this stands."""
        self._stopping = True
        self._notifier.stopping("stopping")
        log.info("stopping")
        self._server.set_serving(False)
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop, DRAIN_S, self._write())
            await asyncio.to_thread(measured.save, self._engine.costs.pack(), *self._kept(self._engine))
        # The link comes after what answers: the last answers over MQTT, whole or cut off, go out before its `offline`.
        await self._server.stop(GRACE_S)
        if self._link is not None:
            await asyncio.to_thread(self._link.stop)
        await asyncio.to_thread(self._metrics.stop)
        log.info("stopped")


def _not_loaded(window: int) -> EngineStatus:
    return EngineStatus(
        model="",
        ready=False,
        context_tokens=0,
        context_window=window,
        oldest_event_s=0.0,
        newest_event_s=0.0,
        queue_depth=0,
        backlog=0,
        state_nbytes=0,
        forks=0,
        sessions=0,
        readings={},
        cameras=(),
        recent=(),
        counters={},
    )


def _differences(applied: Config, wanted: Config) -> list[str]:
    """Paths whose values differ: what only a restart can apply."""
    return [
        f"{section}.{key}"
        for section in applied.__struct_fields__
        for key in getattr(applied, section).__struct_fields__
        if getattr(getattr(applied, section), key) != getattr(getattr(wanted, section), key)
    ]
