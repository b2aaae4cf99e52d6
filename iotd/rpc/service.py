"""The Iotd servicer: one question in, its events or scores out, before its deadline.

Knows the engine by a small protocol only.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import grpc

from iotd import events
from iotd.config import AskConfig
from iotd.errors import DeadlineExceeded, Overloaded, Unavailable
from iotd.events import RGB, Accepted, AnswerEvent, Delta, Done, Failed, ServerStatus, ServingState
from iotd.rpc import request as requests
from iotd.rpc.answer import to_ask_event, to_classification
from iotd.rpc.errors import errors_as_status
from iotd.rpc.mailbox import Mailbox
from iotd.rpc.status import to_response
from iotd.v1 import iotd_pb2, iotd_pb2_grpc

MAX_OPEN_ASKS = 64
"""Calls at once. The engine's queue is far shorter; this bounds what waits in front of it with images to decode."""
STUCK_S = 5.0
"""An engine that has not ended an answer so long after its deadline will not: the call is ended without it."""
DECODERS = 2
"""Images decoded at once: each takes tens of megabytes while it is."""

Tell = Callable[[Accepted | Delta | Done], Awaitable[None]]
"""Takes the events of an answer, one after the other."""
Write = Callable[[iotd_pb2.AskEvent], Awaitable[None]]
"""The same, as they are on the wire."""
AnyContext = grpc.aio.ServicerContext[Any, Any]
AskContext = grpc.aio.ServicerContext[iotd_pb2.AskRequest, iotd_pb2.AskEvent]
ClassifyContext = grpc.aio.ServicerContext[iotd_pb2.ClassifyRequest, iotd_pb2.ClassifyResponse]
StatusContext = grpc.aio.ServicerContext[iotd_pb2.GetStatusRequest, iotd_pb2.GetStatusResponse]


class Ticket(Protocol):
    """A submitted ask."""

    @property
    def accepted(self) -> Accepted: ...

    def cancel(self) -> None:
        """Stop within one step. From any thread, at any time, more than once."""


class AskEngine(Protocol):
    """What answers asks."""

    def check_format(self, ask: events.Ask) -> None:
        """Compile the ask's format. From any thread; takes up to a second. Raises InvalidInput."""

    def submit(self, ask: events.Ask, sink: Callable[[AnswerEvent], None]) -> Ticket:
        """Queue the ask. `sink` gets Delta*, then one Done or Failed, on another thread. Raises IotdError at once."""


class Service(iotd_pb2_grpc.IotdServicer):
    """Ask, Classify and GetStatus. Lives on one event loop."""

    def __init__(
        self, status: Callable[[], ServerStatus], limits: AskConfig, decode_image: Callable[[bytes], RGB]
    ) -> None:
        self.engine: AskEngine | None = None
        self.state = ServingState.LOADING
        self._status = status
        self.limits = limits
        self._decode_image = decode_image
        self._decoders = asyncio.Semaphore(DECODERS)
        self._compiler = asyncio.Semaphore(1)
        self._open_asks = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._mailboxes: set[Mailbox] = set()

    async def Ask(self, request: iotd_pb2.AskRequest, context: AskContext) -> None:  # noqa: N802 - the proto's name
        """See the proto."""
        async with errors_as_status(context):
            await self._call(request, context, partial(_write, context.write))

    async def Classify(  # noqa: N802 - the proto's name
        self, request: iotd_pb2.ClassifyRequest, context: ClassifyContext
    ) -> iotd_pb2.ClassifyResponse | None:
        """See the proto."""
        told: list[AnswerEvent] = []

        async def keep(event: AnswerEvent) -> None:
            told.append(event)

        async with errors_as_status(context):
            await self._call(request, context, keep)
            accepted, done = told
            assert isinstance(accepted, Accepted) and isinstance(done, Done)
            return to_classification(accepted, done)
        return None

    def budget_s(self, request: requests.Request) -> float:
        """The request's budget, or the default, up to the server's maximum. Raises InvalidInput."""
        return requests.budget_s(request, self.limits)

    async def answer(self, request: iotd_pb2.AskRequest, arrived_s: float, ends_s: float, write: Write) -> None:
        """Write an answer's events by `ends_s`, whichever way the question came. Raises IotdError.

        arrived_s, ends_s: on the monotonic clock.
        """
        await self._answer(request, arrived_s, ends_s, partial(_write, write))

    async def GetStatus(  # noqa: N802 - the proto's name
        self, request: iotd_pb2.GetStatusRequest, context: StatusContext
    ) -> iotd_pb2.GetStatusResponse | None:
        """See the proto."""
        async with errors_as_status(context):
            return to_response(self._status())
        return None

    async def drain(self, grace_s: float) -> None:
        """Wait for the open asks, at most `grace_s` seconds; then end them with UNAVAILABLE."""
        try:
            await asyncio.wait_for(self._idle.wait(), grace_s)
        except TimeoutError:
            for mailbox in self._mailboxes:
                mailbox.put(Failed(Unavailable("the daemon is stopping: the answer was cut off, ask again")))

    def _admit(self) -> None:
        if self._open_asks >= MAX_OPEN_ASKS:
            raise Overloaded(f"{MAX_OPEN_ASKS} questions are open already: ask again later")
        self._open_asks += 1
        self._idle.clear()

    def _leave(self) -> None:
        self._open_asks -= 1
        if not self._open_asks:
            self._idle.set()

    async def _call(self, request: requests.Request, context: AnyContext, tell: Tell) -> None:
        arrived_s, left_s = time.monotonic(), context.time_remaining()
        ends_s = requests.deadline_s(request, arrived_s, left_s, self.limits)
        try:
            await self._answer(request, arrived_s, ends_s, tell)
        except Overloaded as error:
            if error.needed_s is not None:
                error.needed_s = requests.budget_for(error.needed_s)
            raise
        except DeadlineExceeded as error:
            if left_s is None or left_s >= self.budget_s(request):
                raise
            raise DeadlineExceeded(f"the call's own deadline of {left_s:.3g} s came before the budget's end") from error

    async def _answer(self, request: requests.Request, arrived_s: float, ends_s: float, tell: Tell) -> None:
        self._admit()
        try:
            self._serving_engine()
            ask = requests.parse(request, arrived_s, ends_s, self.limits)
            if request.images:
                ask = replace(ask, images=await self._images(request, ends_s))
            if ask.format is not None:
                await self._check_format(ask)
            await self._run(ask, tell)
        finally:
            self._leave()

    async def _images(self, request: requests.Request, ends_s: float) -> tuple[RGB, ...]:
        async with _ends_by(ends_s, "the budget ended while the images were decoded"), self._decoders:
            return await requests.decode_images(list(request.images), self._decode_image)

    async def _check_format(self, ask: events.Ask) -> None:
        async with _ends_by(ask.deadline_s, "the budget ended while the format was compiled"), self._compiler:
            await asyncio.to_thread(self._serving_engine().check_format, ask)

    async def _run(self, ask: events.Ask, tell: Tell) -> None:
        mailbox = Mailbox()
        # Once more: the daemon may have begun to stop while the images were decoded.
        ticket = self._serving_engine().submit(ask, mailbox.put)
        self._mailboxes.add(mailbox)
        try:
            await tell(ticket.accepted)
            await _deliver(mailbox, tell, ask.deadline_s)
        finally:
            # Also where the client went away: the engine stops within one step. After the end it does nothing.
            ticket.cancel()
            mailbox.close()
            self._mailboxes.discard(mailbox)

    def _serving_engine(self) -> AskEngine:
        if self.state is ServingState.DRAINING:
            raise Unavailable("the daemon is stopping: ask again when it is back", retry_after_s=5.0)
        if self.state is ServingState.LOADING or self.engine is None:
            raise Unavailable("the daemon is loading its model: ask again in a moment", retry_after_s=2.0)
        return self.engine


async def _deliver(mailbox: Mailbox, tell: Tell, deadline_s: float) -> None:
    """Pass the answer on, as fast as it is taken."""
    while True:
        async with _ends_by(deadline_s + STUCK_S, "the engine did not end the answer in time"):
            event = await mailbox.get()
        if isinstance(event, Failed):
            raise event.error
        await tell(event)
        if isinstance(event, Done):
            return


async def _write(write: Write, event: Accepted | Delta | Done) -> None:
    """Send an event, at the client's pace.

    A write has no limit of its own: gRPC cannot end a call in the middle of one. A client that does not read holds this
    coroutine and the rest of its answer, never the engine; when it goes, gRPC cancels both.
    """
    await write(to_ask_event(event))


@asynccontextmanager
async def _ends_by(time_s: float, otherwise: str) -> AsyncIterator[None]:
    """Raises DeadlineExceeded where the block is still waiting at `time_s`, on the monotonic clock."""
    try:
        async with asyncio.timeout(time_s - time.monotonic()):
            yield
    except TimeoutError:
        raise DeadlineExceeded(otherwise) from None
