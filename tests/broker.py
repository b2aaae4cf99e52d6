"""Fixtures with a real mosquitto on a free loopback port. A test file takes them with `pytest_plugins = ("broker",)`.

Where mosquitto is not installed they fail, with the package to install: a broker is part of what is tested.

PYTEST_DONT_REWRITE: test files import names from here too, before pytest loads it as a plugin.
"""

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.subscribeoptions import SubscribeOptions
from patience import PATIENCE_S

from iotd.config import MqttConfig, SubscriptionConfig
from iotd.demo.broker import Mosquitto
from iotd.events import Observation
from iotd.mqtt import Link
from iotd.mqtt.dial import new_properties

RETRY_S = (0.05, 0.2)
SUBSCRIPTIONS = [
    SubscriptionConfig(topic="home/+/temperature", label="{1} temperature", unit="°C"),
    SubscriptionConfig(topic="home/+/climate", kind="json", fields={"temperature": "°C", "humidity": "%"}),
    SubscriptionConfig(topic="home/camera/+", kind="image"),
]

MakeMosquitto = Callable[..., Mosquitto]
"""mosquitto.conf's extra lines → a started broker, closed at the end of the test."""
Listen = Callable[..., "Listener"]
"""(port, topic filter) → what is published there."""
MakeLink = Callable[..., "Linked"]
"""(port, sink, **MqttConfig's fields) → a running link, stopped at the end of the test."""


@pytest.fixture
def mosquitto() -> Iterator[Mosquitto]:
    """A broker that lets everyone in; `kill()` and `start()` restart it on the same port, with nothing retained."""
    with Mosquitto() as broker:
        yield broker


@pytest.fixture
def make_mosquitto() -> Iterator[MakeMosquitto]:
    with contextlib.ExitStack() as stack:
        yield lambda extra: stack.enter_context(Mosquitto(extra=extra))


@pytest.fixture
def listen() -> Iterator[Listen]:
    with contextlib.ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(Listener(*args, **kwargs))


@pytest.fixture
def link() -> Iterator[MakeLink]:
    with contextlib.ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(Linked(*args, **kwargs))


class Listener:
    """A client of its own that keeps what the broker sends it."""

    def __init__(self, port: int, topic: str, *, username: str = "", password: str = "") -> None:
        self._messages: queue.Queue[paho.MQTTMessage] = queue.Queue()
        self._subscribed = threading.Event()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv311)
        if username:
            self._client.username_pw_set(username, password)
        self._client.on_connect = lambda client, *_: client.subscribe(topic, 1)
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = lambda _, __, message: self._messages.put(message)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert self._subscribed.wait(PATIENCE_S)

    def next(self) -> tuple[str, str, bool]:
        """Topic, text and whether it was retained, of the next message."""
        message = self._messages.get(timeout=PATIENCE_S)
        return message.topic, message.payload.decode(), message.retain

    def __enter__(self) -> "Listener":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.disconnect()
        self._client.loop_stop()


class Asker:
    """A client that asks over MQTT, and hears all that may be an answer."""

    def __init__(self, port: int, base: str, *, protocol: int = paho.MQTTv5) -> None:
        self._topic = f"{base}/ask"
        self._answers: queue.Queue[paho.MQTTMessage] = queue.Queue()
        self._heard = threading.Event()
        topics = [f"{base}/answer", f"{base}/answer/stream", "replies/#"]
        how: Any = SubscribeOptions(1) if protocol == paho.MQTTv5 else 1
        self._client = paho.Client(CallbackAPIVersion.VERSION2, protocol=protocol)
        self._client.on_connect = lambda client, *_: client.subscribe([(topic, how) for topic in topics])
        self._client.on_subscribe = lambda *_: self._heard.set()
        self._client.on_message = lambda _, __, message: self._answers.put(message)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert self._heard.wait(PATIENCE_S)

    def ask(self, question: str | bytes | dict[str, Any], *, retain: bool = False, **properties: Any) -> None:
        """properties: of MQTT 5, by paho's names. Returns when the broker has the question."""
        payload = json.dumps(question) if isinstance(question, dict) else question
        given = new_properties(PacketTypes.PUBLISH) if properties else None
        for name, value in properties.items():
            setattr(given, name, value)
        self._client.publish(self._topic, payload, qos=1, retain=retain, properties=given).wait_for_publish(PATIENCE_S)

    def next_message(self) -> paho.MQTTMessage:
        return self._answers.get(timeout=PATIENCE_S)

    def next(self) -> dict[str, Any]:
        """The next answer, or piece of one."""
        told: dict[str, Any] = json.loads(self.next_message().payload)
        return told

    def __enter__(self) -> "Asker":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()


class Linked:
    """A running link and what it delivers."""

    def __init__(self, port: int, sink: Callable[[Observation], None] | None = None, **config: Any) -> None:
        self.events: queue.Queue[Observation] = queue.Queue()
        settings = {"host": "127.0.0.1", "port": port, "subscriptions": SUBSCRIPTIONS} | config
        self.link = Link(MqttConfig(**settings), sink or self.events.put, version="1.2", retry_s=RETRY_S)

    def __enter__(self) -> "Linked":
        self.link.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.link.stop()

    def connected(self) -> "Linked":
        assert self.link.wait_connected(PATIENCE_S)
        return self

    def next(self) -> Observation:
        return self.events.get(timeout=PATIENCE_S)


def until(true: Callable[[], bool]) -> None:
    """Wait for a counter or a state that no event announces."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.005)
