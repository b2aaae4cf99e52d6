"""Publishes the simulated home to a broker, as its devices would: texts, JSON and JPEG on their own topics."""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from iotd.demo.devices import CAMERA_TOPIC, Devices, Report
from iotd.demo.home import Home
from iotd.demo.scene import Scene, jpeg
from iotd.mqtt.publisher import Publisher


@dataclass(slots=True)
class Totals:
    """What was published."""

    readings: int = 0
    frames: int = 0
    lost: int = 0
    """Not taken by the broker: no connection, or too slow a one."""


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
    lived_in: bool = False,
    username: str = "",
    password: str = "",
    stopping: threading.Event | None = None,
    progress: Callable[[Totals], None] | None = None,
    tell: Callable[[Report | Scene], None] = lambda _: None,
) -> Totals:
    """Publish `rate_hz` readings and `frame_hz` frames a second for `duration_s` seconds, or until `stopping` is set.

    speed: simulated seconds in each real one. start_s: simulated time of day at the beginning, seconds since midnight.
    lived_in: the home's. A door or a motion sensor that changes is published at once, in the next reading's place.
    progress: called about once a second. tell: called with each message that the broker was sent. Raises Unavailable
    where the broker cannot be reached; one that goes away later is waited for.
    """
    stopping = stopping or threading.Event()
    with Publisher(host, port, username=username, password=password) as publisher:
        out = _Out(publisher, Devices(Home(seed, start_s, lived_in=lived_in), seed), tell)
        out.announce()
        began_s = time.monotonic()
        end_s = math.inf if duration_s is None else duration_s
        for elapsed_s, kind in _schedule({"reading": rate_hz, "frame": frame_hz, "progress": 1.0}):
            now_s = time.monotonic() - began_s
            due_s = min(elapsed_s, end_s)
            if stopping.wait(max(0.0, due_s - now_s)) or max(now_s, due_s) >= end_s:
                break
            out.devices.advance_to(start_s + elapsed_s * speed)
            if kind == "progress":
                if progress:
                    progress(out.totals)
            elif kind == "frame":
                out.frame()
            else:
                out.readings()
        return out.totals


@contextlib.contextmanager
def running(host: str, port: int, **options: Any) -> "Iterator[Future[Totals]]":
    """The same in a thread, until the end of the `with` block."""
    stopping = threading.Event()
    with ThreadPoolExecutor(1, "simulated-home") as pool:
        try:
            yield pool.submit(run, host, port, stopping=stopping, **options)
        finally:
            stopping.set()


class _Out:
    """Publishes what the devices send, counts it, and tells of it."""

    def __init__(self, publisher: Publisher, devices: Devices, tell: Callable[[Report | Scene], None]) -> None:
        self.devices = devices
        self.totals = Totals()
        self._publisher = publisher
        self._tell = tell

    def announce(self) -> None:
        """The state of every door and motion sensor: they change too rarely to wait for."""
        for report in self.devices.states():
            self._reading(report)

    def readings(self) -> None:
        for report in self.devices.reports():
            self._reading(report)

    def frame(self) -> None:
        scene = self.devices.scene()
        if self._publisher.publish(CAMERA_TOPIC, jpeg(scene.rgb)):
            self.totals.frames += 1
            self._tell(scene)
        else:
            self.totals.lost += 1

    def _reading(self, report: Report) -> None:
        if self._publisher.publish(report.topic, report.payload, retain=report.changed):
            self.totals.readings += 1
            self._tell(report)
        else:
            self.totals.lost += 1


def _schedule(rates_hz: dict[str, float]) -> Iterator[tuple[float, str]]:
    """(seconds since the beginning, what), in order, for ever; a rate of 0 never comes."""
    counts = {kind: 1 for kind, rate_hz in rates_hz.items() if rate_hz > 0}
    while counts:
        due_s, kind = min((counts[kind] / rates_hz[kind], kind) for kind in counts)
        counts[kind] += 1
        yield due_s, kind
