"""The link to the broker: connected whenever it can be, and heard by everyone when it is not.

Owns the reconnecting thread, `<base>/availability` and `<base>/info`. Knows no engine: events leave through a sink, and
questions to whatever answers them.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import paho.mqtt.client as paho
from paho.mqtt.properties import Properties

from iotd.config import MqttConfig, SubscriptionConfig
from iotd.errors import ConfigError
from iotd.events import LinkStatus, Observation
from iotd.ingest import Intake, Routes
from iotd.ingest.image import KEEP_PIXELS
from iotd.ingest.quiet_log import QuietLog
from iotd.mqtt.asks import Answerer, Asks
from iotd.mqtt.backoff import Backoff
from iotd.mqtt.dial import Protocol, availability_topic, base_topic, new_client, read_password, tls_context
from iotd.mqtt.session import FAREWELL_S, Ended, Ending, Session
from iotd.mqtt.subscriber import Subscriber

STABLE_S = 10.0
"""A connection that held so long was a good one: the next wait is short again."""
SUSPICIOUS = 3
"""After so many connections in a row that did not hold, the log says what the reason is most often."""
CONNECT_S = 5.0
"""What paho takes at most to open a socket; nothing ends it sooner."""

_log = logging.getLogger("iotd.mqtt")


class Link:
    """Keeps one connection to the broker, MQTT 5 or else 3.1.1, from `start` to `stop`.

    `sink` is called with every reading and frame, in the thread that parses them; it must not block.
    """

    def __init__(
        self,
        config: MqttConfig,
        sink: Callable[[Observation], None],
        *,
        answerer: Answerer | None = None,
        version: str = "",
        info: Mapping[str, object] | None = None,
        retry_s: tuple[float, float] = (0.5, 60.0),
        keep_pixels: int = KEEP_PIXELS,
    ) -> None:
        """answerer: answers questions; None takes none. With it, this must be called on the event loop it runs on.

        info: what `<base>/info` says besides the version. retry_s: first and longest wait between attempts.
        keep_pixels: larger frames are scaled down to so many before they reach the sink.

        Raises ConfigError where a file of the configuration cannot be read.
        """
        read_password(config)
        tls_context(config)
        self._config = config
        self._info = {"version": version, **(info or {})}
        self._intake = Intake(config, sink, keep_pixels=keep_pixels)
        self._asks = Asks(config, answerer) if answerer is not None else None
        self._subscriber = Subscriber(config.subscriptions, own=[self._asks.topic] if self._asks else [])
        self._backoff = Backoff(*retry_s)
        self._quiet = QuietLog(_log, time.monotonic)
        self._stopping = threading.Event()
        self._session: Session | None = None
        self._protocol: Protocol | None = None
        self._n_connects = 0
        self._n_short = 0
        self._thread = threading.Thread(target=self._run, name="iotd-mqtt", daemon=True)

    def start(self) -> None:
        """Returns at once, with or without a broker. Does nothing where no host is configured."""
        if self._config.host:
            self._intake.start()
            self._thread.start()

    def stop(self) -> None:
        """Publish the last answers and `offline`, disconnect, and end all threads.

        May be called twice, or before `start`; not on the event loop on which questions are answered.
        """
        if self._asks is not None:
            self._asks.stop()
        self._stopping.set()
        if (session := self._session) is not None:
            session.wake()
        if self._thread.ident is not None:
            self._thread.join(CONNECT_S + FAREWELL_S)
        self._intake.stop()

    def wait_connected(self, timeout_s: float | None = None) -> bool:
        """Wait until the broker has answered for every subscription. False where it did not in time."""
        return self._subscriber.settled.wait(timeout_s)

    def reconfigure(self, subscriptions: Sequence[SubscriptionConfig]) -> None:
        """Follow another list of subscriptions from now on."""
        self._intake.reroute(Routes(subscriptions))
        self._subscriber.want(subscriptions)
        if (session := self._session) is not None:
            session.call_soon(lambda: self._subscriber.sync(session))

    def status(self) -> LinkStatus:
        protocol = self._protocol
        return LinkStatus(
            connected=protocol is not None,
            broker=f"{self._config.host}:{self._config.port}" if self._config.host else "",
            protocol=str(protocol) if protocol else "",
            reconnects=max(0, self._n_connects - 1),
            counters=self._intake.counters | (self._asks.counters if self._asks else {}),
        )

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                wait_s = self._wait_s(self._attempt())
            except Exception:  # noqa: BLE001 - the edge of the thread: the link must come back from a defect too
                self._quiet.warning("defect", "the link to the broker failed", exc_info=True)
                wait_s = self._backoff.slow_s()
            self._stopping.wait(wait_s)

    def _attempt(self) -> Ended:
        """One connection, from its opening to its end: MQTT 5, or 3.1.1 where the broker does not know 5."""
        ended = self._connect(Protocol.V5)
        if ended.how in (Ending.OLD_PROTOCOL, Ending.UNANSWERED) and not self._stopping.is_set():
            _log.debug("no MQTT 5 here (%s); trying 3.1.1", ended.why)
            ended = self._connect(Protocol.V311)
        return ended

    def _connect(self, protocol: Protocol) -> Ended:
        try:
            client = new_client(self._config, protocol)
        except ConfigError as e:
            return Ended(Ending.DENIED, str(e))
        client.on_message = self._on_message
        session = Session(client, protocol, on_open=self._on_open, farewell=self._farewell)
        self._session = session
        try:
            return session.run(self._config, self._stopping)
        finally:
            self._session = self._protocol = None
            self._subscriber.closed()
            if self._asks is not None:
                self._asks.outbox.close()

    def _wait_s(self, ended: Ended) -> float:
        """How long to wait after this ending; says so in the log."""
        if ended.how is Ending.STOPPED:
            return 0.0
        why = ended.why
        if ended.open_s >= STABLE_S:
            self._backoff.reset()
            self._n_short = 0
        elif ended.how is Ending.LOST:
            self._n_short += 1
            why += self._suspicion()
        wait_s = self._backoff.slow_s() if ended.how is Ending.DENIED else self._backoff.next_s()
        broker = f"{self._config.host}:{self._config.port}"
        self._quiet.warning(why, f"MQTT broker {broker}: {why}; next try in {wait_s:.1f} s")
        return wait_s

    def _suspicion(self) -> str:
        """Two clients with one id throw each other out, and not every broker says so."""
        if self._n_short < SUSPICIOUS:
            return ""
        return (
            ", again and again: another client with the same mqtt.node or mqtt.client_id may be throwing this one out"
        )

    def _on_open(self, session: Session, features: Properties) -> None:
        self._n_connects += 1
        self._protocol = session.protocol
        _log.info("connected to %s:%d with MQTT %s", self._config.host, self._config.port, session.protocol)
        session.client.publish(availability_topic(self._config), "online", qos=1, retain=True)
        session.client.publish(f"{base_topic(self._config)}/info", json.dumps(self._info), qos=1, retain=True)
        self._subscriber.open(session, features)
        if self._asks is not None:
            self._asks.outbox.open(session)

    def _farewell(self, session: Session) -> paho.MQTTMessageInfo:
        if self._asks is not None:
            self._asks.outbox.flush()
        return session.client.publish(availability_topic(self._config), "offline", qos=1, retain=True)

    def _on_message(self, client: paho.Client, userdata: object, message: paho.MQTTMessage) -> None:
        """Hands over and returns: while this runs, paho reads nothing."""
        try:
            topic = message.topic
        except UnicodeDecodeError:
            return
        via = self._subscriber.via(message)
        if self._asks is None or topic != self._asks.topic:
            self._intake.offer(topic, bytes(message.payload), time.time(), retained=message.retain, via=via)
        elif via is None or topic in via:
            self._asks.offer(message, time.monotonic())
