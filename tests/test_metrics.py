"""What Prometheus scrapes is what the daemon's status and its answers say."""

import urllib.request
from collections.abc import Iterator
from dataclasses import replace

import pytest
from patience import PATIENCE_S
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import DONE, STATUS

from iotd.errors import ConfigError
from iotd.events import Answered, ServerStatus, Timings, Usage
from iotd.ops.metrics import Metrics

NOW_S = 1_700_000_110.5


class Scraped:
    """A daemon's status that a test can change, and what is scraped of it."""

    def __init__(self) -> None:
        self.status: ServerStatus = STATUS
        self.metrics = Metrics(lambda: self.status, lambda: NOW_S)
        self.port = self.metrics.start("127.0.0.1", 0)

    def samples(self) -> dict[tuple[str, tuple[str, ...]], float]:
        url = f"http://127.0.0.1:{self.port}/metrics"
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as reply:
            families = text_string_to_metric_families(reply.read().decode())
            return {
                (sample.name, tuple(sample.labels.values())): sample.value for f in families for sample in f.samples
            }


@pytest.fixture
def scraped() -> Iterator[Scraped]:
    made = Scraped()
    yield made
    made.metrics.stop()


def test_the_status_is_told_at_each_scrape(scraped: Scraped) -> None:
    found = scraped.samples()
    assert found["iotd_context_tokens", ()] == 700
    assert found["iotd_context_newest_event_age_seconds", ()] == 10
    assert found["iotd_build_info", ("tiny", "1.2.3")] == 1
    assert found["iotd_soc_temperature_celsius", ()] == 51.5
    assert found["iotd_readings_total", ("kitchen temperature",)] == 4
    assert found["iotd_frames_total", ("door",)] == 9
    assert found["iotd_frames_dropped_total", ("door", "newer_came")] == 2
    assert found["iotd_frames_dropped_total", ("door", "unfit")] == 1
    assert found["iotd_frame_age_seconds", ("door",)] == 2
    assert found["iotd_forks_in_use", ()] == 1
    assert found["iotd_mqtt_connected", ()] == 1
    assert found["iotd_sessions", ()] == 3
    scraped.status = replace(STATUS, link=None, temperature_c=None, uptime_s=99.0)
    found = scraped.samples()
    assert found["iotd_uptime_seconds", ()] == 99
    assert not any(name.startswith(("iotd_mqtt", "iotd_soc")) for name, _ in found)


def test_an_answers_times_are_counted(scraped: Scraped) -> None:
    scraped.metrics.answered(Answered("a", "stop", 5.0, DONE.usage, DONE.timings))
    scraped.metrics.answered(Answered("b", "budget", 2.4, DONE.usage, DONE.timings))
    scraped.metrics.answered(Answered("c", "DEADLINE_EXCEEDED", 2.4, Usage(), Timings()))
    found = scraped.samples()
    assert found["iotd_e2e_request_latency_seconds_count", ()] == 2
    assert found["iotd_e2e_request_latency_seconds_sum", ()] == 5.0
    assert found["iotd_time_to_first_token_seconds_sum", ()] == 1.75
    assert found["iotd_request_prefill_time_seconds_sum", ()] == 1.25
    assert found["iotd_inter_token_latency_seconds_sum", ()] == 1.5
    assert found["iotd_budget_overshoot_seconds_count", ()] == 1
    assert found["iotd_budget_overshoot_seconds_sum", ()] == pytest.approx(0.1)


def test_how_asks_and_restores_ended_are_labels(scraped: Scraped) -> None:
    counters = {"asks_stop": 3, "asks_expired": 1, "coalesced_readings": 7, "snapshots_refused": 1, "asks_rejected": 2}
    scraped.status = replace(STATUS, engine=replace(STATUS.engine, counters=counters))
    found = scraped.samples()
    assert found["iotd_requests_total", ("stop",)] == 3
    assert found["iotd_requests_total", ("deadline_exceeded",)] == 1
    assert found["iotd_requests_total", ("budget",)] == 0
    assert found["iotd_readings_skipped_total", ("newer_came",)] == 7
    assert found["iotd_snapshot_restores_total", ("refused",)] == 1
    assert found["iotd_requests_rejected_total", ("queue_full",)] == 2


def test_a_taken_address_names_its_key(scraped: Scraped) -> None:
    with pytest.raises(ConfigError, match=r"metrics\.listen"):
        Metrics(lambda: STATUS, lambda: NOW_S).start("127.0.0.1", scraped.port)
