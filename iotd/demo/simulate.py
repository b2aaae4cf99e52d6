"""Publishes the simulated home to a broker, as its devices would: texts, JSON and JPEG on their own topics."""

import json
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from iotd.config import SubscriptionConfig
from iotd.demo.home import ROOMS, Change, Home
from iotd.demo.scene import draw, jpeg, light_at
from iotd.mqtt.publisher import Publisher

CLIMATE_ROOMS = ("bedroom", "bathroom")
"""Rooms whose sensor sends JSON with temperature and humidity; the others send the temperature as text."""
CAMERA_TOPIC = "home/camera/door"


@dataclass(slots=True)
class Totals:
    """What was published."""

    readings: int = 0
    frames: int = 0
    lost: int = 0
    """Not taken by the broker: no connection, or too slow a one."""


def home_subscriptions() -> list[SubscriptionConfig]:
    """What a daemon subscribes to in order to read this home."""
    return [
        SubscriptionConfig(topic="home/+/temperature", label="{1} temperature", unit="°C"),
        SubscriptionConfig(
            topic="home/+/climate", kind="json", label="{1}", fields={"temperature": "°C", "humidity": "%"}
        ),
        SubscriptionConfig(topic="home/+/motion", label="{1} motion"),
        SubscriptionConfig(topic="home/door/+", label="{2} door"),
        SubscriptionConfig(topic="home/power/+", kind="json", label="{2} power", fields={"value": "W"}),
        SubscriptionConfig(topic="home/camera/+", kind="image", label="{2}"),
    ]


def run(
    host: str,
    port: int,
    *,
    seed: int = 0,
    rate_hz: float = 2.0,
    frame_hz: float = 0.2,
    duration_s: float | None = None,
    speed: float = 1.0,
    start_s: float = 8 * 3600.0,
    username: str = "",
    password: str = "",
    stopping: threading.Event | None = None,
    progress: Callable[[Totals], None] | None = None,
) -> Totals:
    """Publish `rate_hz` readings and `frame_hz` frames a second for `duration_s` seconds, or until `stopping` is set.

    speed: simulated seconds in each real one. start_s: simulated time of day at the beginning, seconds since midnight.
    A door or a motion sensor that changes is published at once, in the next reading's place. progress: called about
    once a second. Raises Unavailable where the broker cannot be reached; one that goes away later is waited for.
    """
    stopping = stopping or threading.Event()
    with Publisher(host, port, username=username, password=password) as publisher:
        device = Devices(publisher, seed, start_s)
        device.announce()
        began_s = time.monotonic()
        end_s = math.inf if duration_s is None else duration_s
        for elapsed_s, kind in _schedule({"reading": rate_hz, "frame": frame_hz, "progress": 1.0}):
            now_s = time.monotonic() - began_s
            due_s = min(elapsed_s, end_s)
            if stopping.wait(max(0.0, due_s - now_s)) or max(now_s, due_s) >= end_s:
                break
            device.advance_to(elapsed_s * speed)
            if kind == "progress":
                if progress:
                    progress(device.totals)
            elif kind == "frame":
                device.publish_frame()
            else:
                device.publish_reading()
        return device.totals


class Devices:
    """The home's devices: each reads the truth as precisely as such a device does, and publishes it."""

    def __init__(self, publisher: Publisher, seed: int, start_s: float) -> None:
        self.home = Home(seed, start_s)
        self.totals = Totals()
        self._publisher = publisher
        self._start_s = start_s
        self._rng = np.random.default_rng(seed)
        self._order = random.Random(seed)
        self._changes: list[Change] = []
        self._sensors = self._rounds()

    def announce(self) -> None:
        """Publish the state of every door and motion sensor, retained: they change too rarely to wait for."""
        for door, is_open in self.home.truth.doors.items():
            self._publish_change(Change("door", door, "open" if is_open else "closed"))
        for name, room in self.home.truth.rooms.items():
            self._publish_change(Change("motion", name, "detected" if room.motion else "clear"))

    def advance_to(self, simulated_s: float) -> None:
        """simulated_s: since the beginning."""
        self._changes += self.home.advance_to(self._start_s + simulated_s)

    def publish_reading(self) -> None:
        """What changed first; else the next sensor of a round in random order."""
        if self._changes:
            for change in self._changes:
                self._publish_change(change)
            self._changes.clear()
            return
        topic, payload = _measure(next(self._sensors), self.home, self._rng)
        self._sent(self._publisher.publish(topic, payload))

    def publish_frame(self) -> None:
        truth = self.home.truth
        scene = draw(truth.at_door, self._rng, light=light_at(truth.time_s))
        if self._publisher.publish(CAMERA_TOPIC, jpeg(scene.rgb)):
            self.totals.frames += 1
        else:
            self.totals.lost += 1

    def _publish_change(self, change: Change) -> None:
        topic = f"home/door/{change.name}" if change.device == "door" else f"home/{change.name}/motion"
        self._sent(self._publisher.publish(topic, change.state, retain=True))

    def _sent(self, taken: bool) -> None:
        if taken:
            self.totals.readings += 1
        else:
            self.totals.lost += 1

    def _rounds(self) -> Iterator[str]:
        topics = [f"home/{room}/{'climate' if room in CLIMATE_ROOMS else 'temperature'}" for room in ROOMS]
        topics += [f"home/power/{appliance}" for appliance in self.home.truth.power]
        while True:
            yield from self._order.sample(topics, len(topics))


def _measure(topic: str, home: Home, rng: np.random.Generator) -> tuple[str, str]:
    """A device's payload for its topic: the truth, with the noise and the rounding of a cheap sensor."""
    _, name, quantity = topic.split("/")
    if name == "power":
        watts = home.truth.power[quantity]
        return topic, json.dumps({"value": round(max(0.0, watts * (1 + rng.normal(0, 0.01))))})
    room = home.truth.rooms[name]
    temperature = round(room.temperature + float(rng.normal(0, 0.05)), 1)
    if quantity == "climate":
        return topic, json.dumps({"temperature": temperature, "humidity": round(room.humidity), "battery": 97})
    return topic, f"{temperature:.1f}"


def _schedule(rates_hz: dict[str, float]) -> Iterator[tuple[float, str]]:
    """(seconds since the beginning, what), in order, for ever; a rate of 0 never comes."""
    counts = {kind: 1 for kind, rate_hz in rates_hz.items() if rate_hz > 0}
    while counts:
        due_s, kind = min((counts[kind] / rates_hz[kind], kind) for kind in counts)
        counts[kind] += 1
        yield due_s, kind
