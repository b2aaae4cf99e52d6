"""One connection to the broker, from CONNECT to its end, run by the thread that calls `run`.

All of paho happens in that one thread, by paho's interface for external loops: no thread of paho's own, no lock held
across its callbacks. Knows nothing of what is published or subscribed.
"""

import selectors
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from iotd.config import MqttConfig
from iotd.mqtt.dial import Protocol, connect, new_properties
from iotd.mqtt.waker import Waker

ANSWER_S = {Protocol.V5: 3.0, Protocol.V311: 10.0}
"""How long a broker may take to answer CONNECT. Less for 5, since a broker that knows only 3.1.1 may misread a CONNECT
with a last will, and wait for its rest for ever: amqtt 0.12 does."""
FAREWELL_S = 2.0
"""How long a clean stop waits for the broker to take the last messages."""

_UNSPECIFIED = 0x80
_UNSUPPORTED_VERSION = 0x84
_DENIED = frozenset({0x86, 0x87, 0x8A, 0x8C})
"""Bad user name or password, not authorized, banned, bad authentication method (MQTT 5, table 2-6)."""


class Ending(Enum):
    """How a connection ended."""

    STOPPED = auto()
    """This side wanted it."""
    LOST = auto()
    """It was open, and broke."""
    UNREACHABLE = auto()
    """No socket, or no TLS."""
    UNANSWERED = auto()
    """The broker gave no CONNACK: what some do when they do not know the protocol's version."""
    OLD_PROTOCOL = auto()
    """The broker refused the protocol's version."""
    DENIED = auto()
    """Wrong credentials, or not allowed."""
    REFUSED = auto()
    """Any other reason the broker gave."""


@dataclass(frozen=True, slots=True)
class Ended:
    how: Ending
    why: str
    """For the log."""
    open_s: float = 0.0
    """How long it was open, seconds."""


class Session:
    """`on_open` is called with CONNACK's properties, `farewell` before a wanted end; both in the session's thread."""

    def __init__(
        self,
        client: paho.Client,
        protocol: Protocol,
        *,
        on_open: Callable[["Session", Properties], None],
        farewell: Callable[["Session"], paho.MQTTMessageInfo],
    ) -> None:
        self.client = client
        self.protocol = protocol
        self._on_open = on_open
        self._farewell = farewell
        self._waker = Waker()
        self._actions: deque[Callable[[], None]] = deque()
        self._opened_s: float | None = None
        self._refusal: Ended | None = None
        self._last_words = "the connection broke"
        client.on_connect = self._connected
        client.on_disconnect = self._disconnected

    def call_soon(self, action: Callable[[], None]) -> None:
        """Run `action` in the session's thread, once it is open; from any thread. Forgotten where it ends first."""
        self._actions.append(action)
        self._waker.wake()

    def wake(self) -> None:
        """Have the session look at `stopping`; from any thread."""
        self._waker.wake()

    def run(self, config: MqttConfig, stopping: threading.Event) -> Ended:
        """Connect, and serve until the connection ends or `stopping` is set. The session cannot be run again."""
        try:
            connect(self.client, config, self.protocol)
        except (OSError, ValueError) as e:
            self._waker.close()
            return Ended(Ending.UNREACHABLE, str(e))
        try:
            return self._serve(stopping)
        finally:
            if (sock := self.client.socket()) is not None:
                sock.close()
            self._waker.close()

    def _serve(self, stopping: threading.Event) -> Ended:
        answer_s = ANSWER_S[self.protocol]
        give_up_s = time.monotonic() + answer_s
        sock = self.client.socket()
        assert sock is not None
        with selectors.DefaultSelector() as selector:
            selector.register(sock, selectors.EVENT_READ)
            selector.register(self._waker, selectors.EVENT_READ)
            while self.client.socket() is not None and not stopping.is_set():
                self._turn(selector, 1.0)
                if self._opened_s is None and time.monotonic() > give_up_s:
                    return Ended(Ending.UNANSWERED, f"the broker gave no answer within {answer_s:g} s")
            if self.client.socket() is None:
                return self._ended()
            self._leave(selector)
        return Ended(Ending.STOPPED, "stopped")

    def _turn(self, selector: selectors.BaseSelector, timeout_s: float) -> None:
        """Wait for the socket or a wake-up, and do what there is to do."""
        sock = self.client.socket()
        assert sock is not None
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.client.want_write() else 0)
        if selector.get_key(sock).events != wanted:
            selector.modify(sock, wanted)
        # What TLS has already taken off the socket, select does not see.
        decrypted = bool(sock.pending()) if hasattr(sock, "pending") else False
        ready = {key.fileobj: events for key, events in selector.select(0 if decrypted else timeout_s)}
        if self._waker in ready:
            self._waker.drain()
        while self._actions and self._opened_s is not None:
            self._actions.popleft()()
        if decrypted or ready.get(sock, 0) & selectors.EVENT_READ:
            self.client.loop_read()
        if ready.get(sock, 0) & selectors.EVENT_WRITE:
            self.client.loop_write()
        self.client.loop_misc()

    def _leave(self, selector: selectors.BaseSelector) -> None:
        deadline_s = time.monotonic() + FAREWELL_S
        if self._opened_s is not None:
            last = self._farewell(self)
            while self.client.socket() is not None and not last.is_published() and time.monotonic() < deadline_s:
                self._turn(selector, 0.1)
        self.client.disconnect()
        while self.client.socket() is not None and time.monotonic() < deadline_s:
            self._turn(selector, 0.1)

    def _ended(self) -> Ended:
        if self._refusal is not None:
            return self._refusal
        if self._opened_s is None:
            return Ended(Ending.UNANSWERED, "the broker closed the connection without an answer")
        return Ended(Ending.LOST, self._last_words, time.monotonic() - self._opened_s)

    def _connected(
        self, client: paho.Client, userdata: object, flags: object, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if not reason.is_failure:
            self._opened_s = time.monotonic()
            self._on_open(self, properties or new_properties(PacketTypes.CONNACK))
            return
        how = Ending.DENIED if reason.value in _DENIED else Ending.REFUSED
        if reason.value == _UNSUPPORTED_VERSION:
            how = Ending.OLD_PROTOCOL
        self._refusal = Ended(how, f"the broker refused: {reason}")

    def _disconnected(
        self, client: paho.Client, userdata: object, flags: object, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.value != _UNSPECIFIED:
            self._last_words = f"the connection broke: {reason}"
