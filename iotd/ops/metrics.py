"""Prometheus metrics: what the daemon's status says at each scrape, and histograms of the answers as they end.

Knows no engine: status and answers are handed in. Labels have a bounded set of values.
"""

import logging
from collections.abc import Callable, Iterator
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from iotd.errors import ConfigError
from iotd.events import Answered, CameraStatus, FinishReason, LinkStatus, ServerStatus

log = logging.getLogger(__name__)

_LONG_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_OUTCOMES = {
    **{f"asks_{reason.value}": reason.value for reason in FinishReason},
    "asks_expired": "deadline_exceeded",
    "asks_failed": "error",
}
_COUNTERS = {
    "context_swaps": "Successors that took the context's place.",
    "context_tokens_read": "Tokens of the stream read.",
    "prompt_tokens": "Tokens of questions read, images included.",
    "generation_tokens": "Tokens generated.",
    "images_encoded": "Images encoded.",
    "asks_preempted": "Times that an answer made way for an urgent one.",
    "sessions_opened": "Conversations kept.",
    "sessions_dropped": "Conversations that made way for newer ones.",
}
_SKIPPED = {"dropped_readings": "no_room", "coalesced_readings": "newer_came", "lost_events": "defect"}
_RESTORES = {"snapshots_restored": "restored", "snapshots_refused": "refused"}


class Metrics:
    """A registry of its own, served over HTTP once it is started."""

    def __init__(self, status: Callable[[], ServerStatus], age_clock: Callable[[], float]) -> None:
        """age_clock: Unix time, against which the ages of events are told."""
        self.registry = CollectorRegistry()
        self.registry.register(_Status(status, age_clock))
        self._first_token = self._histogram("time_to_first_token", "From arrival to the first piece of the answer.")
        self._between = self._histogram("inter_token_latency", "Mean time of a token, of each answer.", _SHORT_S)
        self._queue = self._histogram("request_queue_time", "Waiting for the model.")
        self._prefill = self._histogram("request_prefill_time", "Reading the question and its images.")
        self._decode = self._histogram("request_decode_time", "Generating.")
        self._total = self._histogram("e2e_request_latency", "From arrival to the end of the answer.")
        self._overshoot = self._histogram("budget_overshoot", "After the deadline, of answers it ended.", _SHORT_S)
        self._server: tuple[WSGIServer, Thread] | None = None

    def start(self, host: str, port: int) -> int:
        """Serve from now on. Returns the port. Raises ConfigError where the address cannot be used."""
        try:
            self._server = start_http_server(port, host, self.registry)
        except OSError as error:
            raise ConfigError(f"{host}:{port} cannot be used: {error.strerror}", field="metrics.listen") from error
        return int(self._server[0].server_port)

    def stop(self) -> None:
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()
            self._server = None

    def answered(self, answer: Answered) -> None:
        """An ask has ended; one that failed has no times."""
        times, usage = answer.timings, answer.usage
        if not times.total_s:
            return
        self._queue.observe(times.queue_s)
        self._prefill.observe(times.image_s + times.prefill_s)
        self._decode.observe(times.decode_s)
        self._total.observe(times.total_s)
        if times.first_token_s:
            self._first_token.observe(times.first_token_s)
        if usage.generation_tokens:
            self._between.observe(times.decode_s / usage.generation_tokens)
        if answer.outcome == FinishReason.BUDGET.value:
            self._overshoot.observe(max(0.0, times.total_s - answer.budget_s))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _LONG_S) -> Histogram:
        return Histogram(f"iotd_{name}_seconds", text, buckets=buckets, registry=self.registry)


class _Status(Collector):
    def __init__(self, status: Callable[[], ServerStatus], age_clock: Callable[[], float]) -> None:
        self._status = status
        self._age_clock = age_clock

    def describe(self) -> list[Metric]:
        """Nothing in advance: it is asked at each scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        engine = status.engine
        build = GaugeMetricFamily("iotd_build_info", "What runs.", labels=("version", "model"))
        build.add_metric((status.version, engine.model), 1)
        yield build
        yield GaugeMetricFamily("iotd_uptime_seconds", "Since the start.", value=status.uptime_s)
        yield GaugeMetricFamily("iotd_resident_memory_bytes", "Of the process.", value=status.resident_nbytes)
        yield GaugeMetricFamily("iotd_state_bytes", "Reserved for all model states.", value=engine.state_nbytes)
        yield GaugeMetricFamily("iotd_context_tokens", "In the context now.", value=engine.context_tokens)
        for name, time_s in (("oldest", engine.oldest_event_s), ("newest", engine.newest_event_s)):
            if time_s:
                age_s = max(0.0, self._age_clock() - time_s)
                yield GaugeMetricFamily(f"iotd_context_{name}_event_age_seconds", "In the context.", value=age_s)
        yield GaugeMetricFamily("iotd_queue_depth", "Asks waiting or running.", value=engine.queue_depth)
        yield GaugeMetricFamily("iotd_backlog", "Events not yet read.", value=engine.backlog)
        yield GaugeMetricFamily("iotd_forks_in_use", "States on which asks are being answered.", value=engine.forks)
        yield GaugeMetricFamily("iotd_sessions", "Conversations kept.", value=engine.sessions)
        if status.temperature_c is not None:
            yield GaugeMetricFamily("iotd_soc_temperature_celsius", "Of the processor.", value=status.temperature_c)
        yield from _counts(engine.counters)
        yield _readings(engine.readings)
        yield from _frames(engine.cameras, self._age_clock())
        if status.link is not None:
            yield from _link(status.link)


def _counts(counters: dict[str, int]) -> Iterator[Metric]:
    for name, text in _COUNTERS.items():
        yield CounterMetricFamily(f"iotd_{name}", text, value=counters.get(name, 0))
    rejected = CounterMetricFamily("iotd_requests_rejected", "Asks refused at once.", labels=("reason",))
    rejected.add_metric(("queue_full",), counters.get("asks_rejected", 0))
    rejected.add_metric(("budget",), counters.get("asks_refused", 0))
    yield rejected
    for metric, text, label, names in (
        ("requests", "Asks, by how they ended.", "finish_reason", _OUTCOMES),
        ("readings_skipped", "Readings never read.", "reason", _SKIPPED),
        ("snapshot_restores", "Snapshots found at the start.", "result", _RESTORES),
    ):
        family = CounterMetricFamily(f"iotd_{metric}", text, labels=(label,))
        for name, value in names.items():
            family.add_metric((value,), counters.get(name, 0))
        yield family


def _readings(readings: dict[str, int]) -> Metric:
    """The engine remembers a bounded number of sensors, and of cameras."""
    family = CounterMetricFamily("iotd_readings", "Readings that arrived.", labels=("source",))
    for source, n in readings.items():
        family.add_metric((source,), n)
    return family


def _frames(cameras: tuple[CameraStatus, ...], now_s: float) -> Iterator[Metric]:
    arrived = CounterMetricFamily("iotd_frames", "Frames that arrived.", labels=("camera",))
    dropped = CounterMetricFamily("iotd_frames_dropped", "Frames never read.", labels=("camera", "reason"))
    age = GaugeMetricFamily("iotd_frame_age_seconds", "Of the newest frame.", labels=("camera",))
    for camera in cameras:
        arrived.add_metric((camera.camera,), camera.frames)
        dropped.add_metric((camera.camera, "newer_came"), camera.replaced)
        dropped.add_metric((camera.camera, "unfit"), camera.refused)
        if camera.newest_s:
            age.add_metric((camera.camera,), max(0.0, now_s - camera.newest_s))
    yield from (arrived, dropped, age)


def _link(link: LinkStatus) -> Iterator[Metric]:
    yield GaugeMetricFamily("iotd_mqtt_connected", "1 while connected to the broker.", value=int(link.connected))
    yield CounterMetricFamily("iotd_mqtt_reconnects", "Connections made again.", value=link.reconnects)
    messages = CounterMetricFamily("iotd_mqtt_messages", "By what became of them.", labels=("kind",))
    for name, value in link.counters.items():
        messages.add_metric((name,), value)
    yield messages
