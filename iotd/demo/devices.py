"""The home's devices: each reads the truth as precisely as such a device does, and says what it would send.

Knows no broker: `simulate` publishes what they send, and `examples` hands it to the model directly.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from iotd.config import SubscriptionConfig
from iotd.demo.home import Change, Home
from iotd.demo.scene import Scene, draw, light_at

CLIMATE_ROOMS = ("bedroom", "bathroom", "cellar", "nursery")
"""Rooms whose sensor sends JSON with temperature and humidity; the others send the temperature as text."""
CAMERA = "door"
CAMERA_TOPIC = f"home/camera/{CAMERA}"
_MISCHIEF_TOPIC = "home/message/phone"


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
        SubscriptionConfig(topic="home/message/+", label="{2} message"),
        SubscriptionConfig(topic="home/camera/+", kind="image", label="{2}"),
    ]


@dataclass(frozen=True, slots=True)
class Report:
    """One message of a device."""

    topic: str
    payload: str
    says: dict[str, str]
    """What whoever reads it then knows: each sensor's label with its value and unit. Empty for mischief."""
    changed: bool = False
    """Something has happened: brokers keep such a message."""


class Devices:
    """Reports of one home, in an endless round, and at once what changes.

    mischief: the share of reports in whose place comes one of `texts`, sent as a message or under a sensor's own topic.
    """

    def __init__(self, home: Home, seed: int, *, mischief: float = 0.0, texts: tuple[str, ...] = ()) -> None:
        self.home = home
        self._seed = seed
        self._rng = random.Random(seed)
        self._noise = np.random.default_rng(seed)
        self._mischief = mischief if texts else 0.0
        self._texts = texts
        self._changes: list[Change] = []
        self._round = self._rounds()
        self._seen: tuple[str, ...] | None = None
        self._n_scenes = 0

    def states(self) -> list[Report]:
        """The state of every door and motion sensor."""
        truth = self.home.truth
        return [_changed(c) for c in (*map(self._door, truth.doors), *map(self._motion, truth.rooms))]

    def advance_to(self, time_s: float) -> None:
        """time_s: the home's own time."""
        self._changes += self.home.advance_to(time_s)

    def reports(self) -> list[Report]:
        """What changed first; else the next device of the round."""
        if self._changes:
            changes, self._changes = self._changes, []
            return [_changed(change) for change in changes]
        topic = next(self._round)
        if self._mischief and self._rng.random() < self._mischief:
            as_text = topic.endswith(("/temperature", "/motion"))
            topic = topic if as_text and self._rng.random() < 0.5 else _MISCHIEF_TOPIC
            return [Report(topic, self._rng.choice(self._texts), {})]
        return [self._measure(topic)]

    def scene(self) -> Scene:
        """The camera's next picture: the same things in their places as long as nothing comes or goes."""
        truth = self.home.truth
        if truth.at_door != self._seen:
            self._seen = truth.at_door
            self._n_scenes += 1
        placed = np.random.default_rng((self._seed, self._n_scenes))
        return draw(truth.at_door, placed, light=light_at(truth.time_s), noise=self._noise)

    def _rounds(self) -> Iterator[str]:
        """Every device in turn, doors and motion sensors included, as they check in though nothing has changed."""
        truth = self.home.truth
        topics = [f"home/{room}/{'climate' if room in CLIMATE_ROOMS else 'temperature'}" for room in truth.rooms]
        topics += [f"home/{room}/motion" for room in truth.rooms]
        topics += [f"home/door/{door}" for door in truth.doors]
        topics += [f"home/power/{appliance}" for appliance in truth.power]
        self._rng.shuffle(topics)
        while True:
            yield from topics

    def _door(self, name: str) -> Change:
        return Change("door", name, "open" if self.home.truth.doors[name] else "closed")

    def _motion(self, name: str) -> Change:
        return Change("motion", name, "detected" if self.home.truth.rooms[name].motion else "clear")

    def _measure(self, topic: str) -> Report:
        """The truth, with the noise and the rounding of a cheap sensor."""
        _, name, quantity = topic.split("/")
        truth = self.home.truth
        if name == "door":
            return _state(self._door(quantity))
        if name == "power":
            watts = round(max(0.0, truth.power[quantity] * (1 + self._noise.normal(0, 0.01))))
            return Report(topic, json.dumps({"value": watts}), {f"{quantity} power": f"{watts} W"})
        room = truth.rooms[name]
        if quantity == "motion":
            return _state(self._motion(name))
        temperature = round(room.temperature + float(self._noise.normal(0, 0.05)), 1)
        if quantity == "temperature":
            return Report(topic, f"{temperature:.1f}", {f"{name} temperature": f"{temperature:.1f} °C"})
        payload = json.dumps({"temperature": temperature, "humidity": round(room.humidity), "battery": 97})
        says = {f"{name} temperature": f"{temperature:g} °C", f"{name} humidity": f"{round(room.humidity)} %"}
        return Report(topic, payload, says)


def _state(change: Change) -> Report:
    if change.device == "door":
        return Report(f"home/door/{change.name}", change.state, {f"{change.name} door": change.state})
    return Report(f"home/{change.name}/motion", change.state, {f"{change.name} motion": change.state})


def _changed(change: Change) -> Report:
    return replace(_state(change), changed=True)
