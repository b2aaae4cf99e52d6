"""A gRPC server on a loopback port with an engine whose every step a test decides."""

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from fake_model import EOS, FakeTokenizer
from patience import PATIENCE_S

from iotd.config import AskConfig, GrpcConfig
from iotd.errors import InvalidInput, IotdError
from iotd.events import (
    RGB,
    Accepted,
    Answered,
    AnswerEvent,
    Ask,
    CameraStatus,
    Delta,
    Done,
    EngineStatus,
    Failed,
    FinishReason,
    LabelScore,
    LinkStatus,
    ServerStatus,
    ServingState,
    Timings,
    Usage,
    Weighed,
)
from iotd.model.grammar import Grammars
from iotd.rpc import Server

PNG = b"good image"

DONE = Done(
    FinishReason.STOP,
    Usage(context_tokens=100, prompt_tokens=12, image_tokens=4, generation_tokens=2),
    Timings(queue_s=0.25, image_s=0.5, prefill_s=0.125, decode_s=1.5, first_token_s=0.875, total_s=2.5),
)

WEIGHED = Weighed((LabelScore("yes", 0.75, -0.5), LabelScore("no", 0.125, -2.25)), none_probability=0.125)
"""What a classification comes to."""

STATUS = ServerStatus(
    version="1.2.3",
    state=ServingState.SERVING,
    uptime_s=12.5,
    resident_nbytes=5_000_000_000,
    temperature_c=51.5,
    engine=EngineStatus(
        model="tiny",
        ready=True,
        context_tokens=700,
        context_window=2048,
        oldest_event_s=1_700_000_000.25,
        newest_event_s=1_700_000_100.5,
        queue_depth=1,
        backlog=3,
        state_nbytes=40_000_000,
        forks=1,
        sessions=3,
        readings={"kitchen temperature": 4, "hallway motion": 1},
        cameras=(CameraStatus("door", 1_700_000_108.5, frames=9, replaced=2, refused=1),),
        recent=(Answered("ask-7", "stop", 2.0, DONE.usage, DONE.timings),),
        counters={"readings": 5, "asks": 2},
    ),
    link=LinkStatus(
        connected=True, broker="localhost:1883", protocol="5", reconnects=2, counters={"messages": 9, "readings": 5}
    ),
)


class ScriptedTicket:
    """One ask at the engine, answered by the test's hand."""

    def __init__(self, ask: Ask, sink: Callable[[AnswerEvent], None], position: int) -> None:
        self.ask = ask
        self.sink = sink
        self.accepted = Accepted(f"ask-{position}", position)
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()

    def say(self, *pieces: str) -> None:
        for piece in pieces:
            self.sink(Delta(piece))

    def think(self, *pieces: str) -> None:
        for piece in pieces:
            self.sink(Delta(piece, thought=True))

    def finish(self, done: Done = DONE) -> None:
        self.sink(done)

    def fail(self, error: IotdError) -> None:
        self.sink(Failed(error))


class ScriptedEngine:
    """Hands each ask to the test, or to `script` in a thread of its own."""

    def __init__(self) -> None:
        self.tickets: queue.Queue[ScriptedTicket] = queue.Queue()
        self.script: Callable[[ScriptedTicket], None] | None = None
        self.refusal: Exception | None = None
        self._asks = 0
        self._grammars = Grammars(FakeTokenizer(), {EOS})  # type: ignore[arg-type] # a stand-in

    def check_format(self, ask: Ask) -> None:
        assert ask.format is not None
        self._grammars.constraint(ask.format, ask.sampling.max_tokens)

    def submit(self, ask: Ask, sink: Callable[[AnswerEvent], None]) -> ScriptedTicket:
        if self.refusal is not None:
            raise self.refusal
        ticket = ScriptedTicket(ask, sink, self._asks)
        self._asks += 1
        self.tickets.put(ticket)
        if self.script is not None:
            threading.Thread(target=self.script, args=(ticket,)).start()
        return ticket

    def next(self) -> ScriptedTicket:
        return self.tickets.get(timeout=PATIENCE_S)


def decode_image(data: bytes) -> RGB:
    """Takes PNG above, and nothing else."""
    if data != PNG:
        raise InvalidInput("neither a JPEG nor a PNG")
    return np.full((2, 3, 3), 7, np.uint8)


class Daemon:
    """The server on an event loop in a thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, server: Server, engine: ScriptedEngine, port: int) -> None:
        self._loop = loop
        self.server = server
        self.engine = engine
        self.port = port
        self.target = f"127.0.0.1:{port}"

    def submit(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Start the coroutine on the server's loop; returns a concurrent future."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run the coroutine on the server's loop, and wait for it."""
        return self.submit(work).result(PATIENCE_S)

    def set_serving(self, serving: bool) -> None:
        self._call(self.server.set_serving, serving)

    def set_health(self, healthy: bool) -> None:
        self._call(self.server.set_health, healthy)

    def _call(self, setter: Callable[[bool], None], value: bool) -> None:
        async def call() -> None:
            setter(value)

        self.run(call())


@contextmanager
def running(
    config: GrpcConfig | None = None,
    *,
    ask: AskConfig | None = None,
    decode: Callable[[bytes], RGB] = decode_image,
    status: Callable[[], ServerStatus] = lambda: STATUS,
    serving: bool = True,
    attached: bool = True,
) -> Iterator[Daemon]:
    """A daemon, until the block ends. Not `attached`: it begins without its engine."""
    config = config or GrpcConfig(listen="127.0.0.1:0")
    engine = ScriptedEngine()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[Server, int]:
        server = Server(engine if attached else None, status, config, ask=ask, decode_image=decode)
        return server, await server.start()

    try:
        server, port = asyncio.run_coroutine_threadsafe(start(), loop).result(PATIENCE_S)
        daemon = Daemon(loop, server, engine, port)
        daemon.set_serving(serving)
        try:
            yield daemon
        finally:
            daemon.run(server.stop(0.0))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE_S)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


@contextmanager
def channel(daemon: Daemon) -> Iterator[grpc.Channel]:
    """A plain gRPC channel, for what a client of another language would do."""
    with grpc.insecure_channel(daemon.target) as opened:
        yield opened
