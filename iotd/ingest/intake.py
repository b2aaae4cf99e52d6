"""The way in: messages are offered by the broker's thread, parsed by one of its own, and handed on as events.

Knows no broker and no engine: `offer` on one side, a sink on the other.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection

from iotd.config import MqttConfig
from iotd.counters import Counters
from iotd.errors import InvalidInput
from iotd.events import Frame, Observation
from iotd.ingest.image import KEEP_PIXELS
from iotd.ingest.inbox import Inbox, Message
from iotd.ingest.parse import check_size, parse
from iotd.ingest.quiet_log import QuietLog
from iotd.ingest.recall import Recall
from iotd.ingest.routes import Route, Routes
from iotd.ingest.text import one_line

COPY_WINDOW_S = 0.1
"""Where several filters match a topic, the same payload within this time is one message that was sent twice."""
FRAME_PAYLOADS = 4
"""Frames waiting to be decoded take at most so many times the largest payload allowed."""

_log = logging.getLogger("iotd.ingest")

_KINDS = (
    "messages",
    "readings",
    "frames",
    "dropped_queue_full",
    "dropped_newer_frame",
    "dropped_min_interval",
    "dropped_overlap",
    "dropped_repeated",
    "dropped_retained_frame",
    "dropped_unrouted",
    "dropped_empty",
    "dropped_not_utf8",
    "dropped_not_json",
    "dropped_missing_field",
    "dropped_not_image",
    "dropped_too_large",
    "dropped_defect",
)


class Intake:
    """Parses what is offered, in one thread, and calls `sink` from it with every event; the sink must not block."""

    def __init__(
        self, config: MqttConfig, sink: Callable[[Observation], None], *, keep_pixels: int = KEEP_PIXELS
    ) -> None:
        """keep_pixels: frames of more are scaled down, since whoever takes them may keep one for each camera."""
        self._config = config
        self._keep_pixels = min(keep_pixels, KEEP_PIXELS)
        self._sink = sink
        self._routes = Routes(config.subscriptions)
        self._recall = Recall()
        self._counters = Counters(_KINDS)
        self._inbox = Inbox(
            max_readings=config.queue, max_frame_nbytes=FRAME_PAYLOADS * max(config.max_payload_bytes, 1)
        )
        self._quiet = QuietLog(_log, time.monotonic)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="iotd-ingest", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """What still waits is let go. Returns once the thread has ended; may be called twice, or before start."""
        self._inbox.close()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    @property
    def counters(self) -> dict[str, int]:
        """Counts since start: messages, readings, frames, and each kind of drop as `dropped_<kind>`."""
        return self._counters.snapshot()

    def reroute(self, routes: Routes) -> None:
        """Messages offered from now on follow the new subscriptions."""
        with self._lock:
            self._routes = routes

    def offer(
        self, topic: str, payload: bytes, time_s: float, *, retained: bool = False, via: Collection[str] | None = None
    ) -> None:
        """Take one message; returns at once, from any thread, and never raises for what is in it.

        time_s: arrival, seconds since the Unix epoch. retained: the broker had stored it. via: the filters on whose
        account the broker sent this copy; None where it does not say.

        A retained reading is taken: it is the sensor's last known value, and a context that starts without it knows
        nothing of what changes rarely. Seen again after a reconnect, it is dropped. A retained frame is dropped: a
        picture of unknown age would pass for the present.
        """
        self._counters.add("messages")
        with self._lock:
            route = self._routes.find(topic)
            reason = self._refusal(route, topic, payload, time_s, retained, via)
        if reason:
            self._counters.add(f"dropped_{reason}")
        elif route:
            self._enqueue(Message(topic, payload, time_s, route))

    def _refusal(
        self,
        route: Route | None,
        topic: str,
        payload: bytes,
        time_s: float,
        retained: bool,
        via: Collection[str] | None,
    ) -> str:
        """Why a message is not taken; empty where it is, and is remembered."""
        if route is None:
            return "unrouted"
        if via is not None and route.subscription.topic not in via:
            return "overlap"
        if via is None and route.overlaps and self._recall.copies(topic, payload, time_s, COPY_WINDOW_S):
            return "overlap"
        if retained and route.subscription.kind == "image":
            return "retained_frame"
        if retained and self._recall.repeats(topic, payload):
            return "repeated"
        if self._recall.too_soon(topic, time_s, route.subscription.min_interval_s):
            return "min_interval"
        self._recall.remember(topic, payload, time_s)
        return ""

    def _enqueue(self, message: Message) -> None:
        try:
            check_size(message.route, len(message.payload), max_payload_bytes=self._config.max_payload_bytes)
        except InvalidInput as e:
            self._refuse(message, e)
            return
        if message.route.subscription.kind == "image":
            self._counters.add("dropped_newer_frame", self._inbox.put_frame(message))
        else:
            self._counters.add("dropped_queue_full", self._inbox.put_reading(message))

    def _run(self) -> None:
        while (message := self._inbox.take()) is not None:
            try:
                self._deliver(message)
            except Exception:  # noqa: BLE001 - the edge of the thread: one message must not end the stream
                self._quiet.warning("", f"{one_line(message.topic)}: lost to a defect", exc_info=True)
                self._counters.add("dropped_defect")

    def _deliver(self, message: Message) -> None:
        """The interval counts from what was handed on, so it is looked at here once more: several may have waited."""
        if self._too_soon(message):
            self._counters.add("dropped_min_interval")
            return
        try:
            event = parse(
                message.route,
                message.payload,
                message.time_s,
                max_pixels=self._config.max_pixels,
                keep_pixels=self._keep_pixels,
            )
        except InvalidInput as e:
            self._refuse(message, e)
            return
        self._sink(event)
        self._counters.add("frames" if isinstance(event, Frame) else "readings")
        with self._lock:
            self._recall.delivered(message.topic, message.time_s)

    def _too_soon(self, message: Message) -> bool:
        with self._lock:
            return self._recall.too_soon(message.topic, message.time_s, message.route.subscription.min_interval_s)

    def _refuse(self, message: Message, error: InvalidInput) -> None:
        self._counters.add(f"dropped_{error.reason.lower()}")
        if error.reason != "EMPTY":
            self._quiet.warning(message.topic, f"{one_line(message.topic)}: {error}")
