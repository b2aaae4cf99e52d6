"""Questions over MQTT: each is taken from the connection's thread, answered on the event loop, and sent back.

Knows no engine: whatever answers is handed in.
"""

import asyncio
import concurrent.futures
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

import paho.mqtt.client as paho

from iotd.config import MqttConfig
from iotd.counters import Counters
from iotd.errors import Internal, InvalidInput, IotdError, Overloaded, Unavailable
from iotd.mqtt.dial import base_topic
from iotd.mqtt.outbox import Outbox
from iotd.mqtt.question import Question, from_message, peek_transaction, read, take_stream, take_transaction, to_request
from iotd.mqtt.reply import Reply
from iotd.v1 import iotd_pb2

MAX_OPEN_ASKS = 16
"""Questions at once: each may hold a payload of the largest size, and its images."""
SETTLE_S = 1.0
"""How long a stop waits for answers that have ended to be written out."""

_COUNTS = ("asks", "asks_retained", "answers", "answers_dropped")

_log = logging.getLogger("iotd.mqtt")


class Answerer(Protocol):
    """What answers questions. Its methods are called on one event loop."""

    def budget_s(self, request: iotd_pb2.AskRequest) -> float:
        """The request's budget, or the server's default, up to its maximum. Raises InvalidInput."""

    async def answer(
        self,
        request: iotd_pb2.AskRequest,
        arrived_s: float,
        ends_s: float,
        write: Callable[[iotd_pb2.AskEvent], Awaitable[None]],
    ) -> None:
        """Write accepted, delta*, done, by `ends_s`; both times are on the monotonic clock. Raises IotdError."""


class Asks:
    """Must be made on the event loop on which `answerer` runs."""

    def __init__(self, config: MqttConfig, answerer: Answerer) -> None:
        self._base = base_topic(config)
        self.topic = f"{self._base}/ask"
        self._max_nbytes = config.max_payload_bytes
        self._answerer = answerer
        self._loop = asyncio.get_running_loop()
        self._counters = Counters(_COUNTS)
        self.outbox = Outbox(self._counters)
        self._open: dict[concurrent.futures.Future[None], Reply] = {}
        self._stopping = False

    @property
    def counters(self) -> dict[str, int]:
        """Counts since start: asks, asks_retained (ignored), answers (errors too), answers_dropped."""
        return self._counters.snapshot()

    def offer(self, message: paho.MQTTMessage, arrived_s: float) -> None:
        """Take one message, in the connection's thread; returns at once. arrived_s: on the monotonic clock.

        A retained one is ignored: its asker is long gone, and it would be asked again at every connect.
        """
        if message.retain:
            self._counters.add("asks_retained")
            return
        self._counters.add("asks")
        question = from_message(message, arrived_s)
        reply = Reply(question, self._base, self.outbox.put)
        try:
            self._admit(question)
        except IotdError as error:
            reply.transaction = peek_transaction(question.payload)
            reply.fail(error)
            return
        answering = asyncio.run_coroutine_threadsafe(self._answer(question, reply), self._loop)
        self._open[answering] = reply
        answering.add_done_callback(self._open.pop)

    def stop(self) -> None:
        """Refuse what comes from now on, wait shortly for the answers that are about to end, and cut off the rest.

        Not on the loop.
        """
        self._stopping = True
        opened = dict(self._open)
        _, left = concurrent.futures.wait(opened, SETTLE_S)
        for answering in left:
            answering.cancel()
            opened[answering].fail(Unavailable("the daemon is stopping: the answer was cut off, ask again"))

    def _admit(self, question: Question) -> None:
        if self._stopping:
            raise Unavailable("the daemon is stopping: ask again when it is back", retry_after_s=5.0)
        if len(question.payload) > self._max_nbytes:
            raise InvalidInput(f"the question has {len(question.payload)} bytes, at most {self._max_nbytes} are taken")
        if len(self._open) >= MAX_OPEN_ASKS:
            raise Overloaded(f"{MAX_OPEN_ASKS} questions over MQTT are open already: ask again later")

    async def _answer(self, question: Question, reply: Reply) -> None:
        try:
            await self._ask(question, reply)
        except IotdError as error:
            reply.fail(error)
        except Exception:  # noqa: BLE001 - the edge of an ask: whatever it was, its asker gets an answer
            _log.exception("a question over MQTT failed")
            reply.fail(Internal("a defect in iotd: the daemon's log has the details"))

    async def _ask(self, question: Question, reply: Reply) -> None:
        # In threads of their own: a payload with images takes a while.
        fields = await asyncio.to_thread(read, question.payload)
        reply.transaction = take_transaction(fields)
        reply.streams = take_stream(fields)
        request = await asyncio.to_thread(to_request, fields)
        allowed_s = self._answerer.budget_s(request)
        if question.left_s is not None:
            allowed_s = min(allowed_s, question.left_s)
        reply.due_s = question.arrived_s + allowed_s
        await self._answerer.answer(request, question.arrived_s, reply.due_s, reply.write)
