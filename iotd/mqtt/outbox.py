"""What is to be published at least once, over however many connections; put in from any thread.

Knows nothing of what the messages say.
"""

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from iotd.counters import Counters
from iotd.ingest.quiet_log import QuietLog
from iotd.mqtt.dial import Protocol, new_properties
from iotd.mqtt.session import Session

MAX_WAITING = 256
"""Messages that wait for the broker; further ones are dropped."""
MAX_UNACKED = 20
"""Messages that the broker has not confirmed yet: as many as paho sends at once."""

_log = logging.getLogger("iotd.mqtt")


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message."""

    topic: str
    payload: bytes
    correlation: bytes | None = None
    """Sent along as MQTT 5's Correlation Data."""
    due_s: float | None = None
    """Until when it is sent over a new connection too, on the monotonic clock. None: at most once, and not counted."""


class Outbox:
    """Counts `answers` that the broker has confirmed, and `answers_dropped`. All but `put` in the session's thread."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._quiet = QuietLog(_log, time.monotonic)
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._waiting: deque[Outgoing] = deque()
        self._unacked: dict[int, Outgoing] = {}

    def put(self, message: Outgoing) -> None:
        """Publish soon. Returns at once, from any thread."""
        with self._lock:
            session = self._session
            taken = len(self._waiting) < MAX_WAITING and (session is not None or message.due_s is not None)
            if taken:
                self._waiting.append(message)
        if not taken:
            self._drop(message)
        elif session is not None:
            session.call_soon(self.flush)

    def open(self, session: Session) -> None:
        """A new connection: publish what has waited for it, but for what nobody waits for any more."""
        session.client.on_publish = self._published
        now_s = time.monotonic()
        with self._lock:
            self._session = session
            waiting, self._waiting = self._waiting, deque()
            self._waiting.extend(message for message in waiting if _wanted(message, now_s))
        for message in waiting:
            if not _wanted(message, now_s):
                self._drop(message)
        self.flush()

    def close(self) -> None:
        """The connection has ended: what the broker has not confirmed waits for the next."""
        with self._lock:
            self._session = None
            self._waiting.extendleft(reversed(self._unacked.values()))
        self._unacked.clear()

    def flush(self) -> None:
        """Publish what waits, as far as the broker keeps up."""
        while (session := self._session) is not None and len(self._unacked) < MAX_UNACKED:
            with self._lock:
                if not self._waiting:
                    return
                message = self._waiting.popleft()
            info = session.client.publish(
                message.topic,
                message.payload,
                qos=0 if message.due_s is None else 1,
                properties=_properties(session.protocol, message.correlation),
            )
            if message.due_s is not None:
                self._unacked[info.mid] = message

    def _published(
        self, client: paho.Client, userdata: object, mid: int, reason: ReasonCode, properties: Properties | None
    ) -> None:
        message = self._unacked.pop(mid, None)
        if message is None:
            return
        if reason.is_failure:
            self._quiet.warning("", f"the broker does not take an answer for {message.topic[:100]!r}: {reason}")
            self._drop(message)
        else:
            self._counters.add("answers")
        self.flush()

    def _drop(self, message: Outgoing) -> None:
        if message.due_s is not None:
            self._counters.add("answers_dropped")


def _wanted(message: Outgoing, now_s: float) -> bool:
    return message.due_s is not None and message.due_s >= now_s


def _properties(protocol: Protocol, correlation: bytes | None) -> Properties | None:
    if protocol is not Protocol.V5 or correlation is None:
        return None
    properties = new_properties(PacketTypes.PUBLISH)
    properties.CorrelationData = correlation
    return properties
