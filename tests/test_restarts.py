"""A daemon that is killed at any moment starts again warm or cold, and never wrong."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from daemon import serving
from engine_driver import DrivenEngine
from patience import PATIENCE_S

from iotd.client import Client
from iotd.demo.broker import Mosquitto
from iotd.engine.snapshot import unpack_entries
from iotd.model import Model
from iotd.mqtt.publisher import Publisher
from iotd.ops import snapshots

pytestmark = pytest.mark.heavy
KILLS = int(os.environ.get("IOTD_KILLS", "100"))
WINDOW = 4096
SYSTEM = "Watch the home."
QUESTION = "What is open?"
GREEDY = {"max_tokens": 4, "temperature": 0.0, "presence_penalty": 0.0}


def from_scratch(model: Model, path: Path) -> str:
    """What a daemon answers that has read the snapshot's events, one after the other, and was never disturbed."""
    snapshot = snapshots.load(path)
    assert snapshot is not None
    engine = DrivenEngine(model, window=WINDOW, reserve_tokens=256, system=SYSTEM)  # type: ignore[arg-type]
    for entry in unpack_entries(snapshot.header.entries, snapshot.arrays):
        engine._context.append([entry])
        while engine._context.busy:
            engine._context.advance()
    assert engine.status().context_tokens == snapshot.header.live.position
    return engine.answer(QUESTION, max_tokens=4)


def read_some(client: Client, publisher: Publisher, n: int) -> None:
    before = client.status().engine.counters["readings_read"]
    for value in range(3):
        publisher.publish(f"home/door/d{n % 5}", f"open {n}.{value}")
    end_s = time.monotonic() + PATIENCE_S
    while client.status().engine.counters["readings_read"] < before + 3:
        assert time.monotonic() < end_s
        time.sleep(0.01)


def wait_connected(client: Client) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while (link := client.status().link) is None or not link.connected:
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_a_hundred_kills_at_random_moments_never_leave_a_wrong_context(tmp_path: Path, tiny_package: Path) -> None:
    """Each start answers as an undisturbed daemon that has read the events of its snapshot. The model is a tiny one."""
    rng = random.Random(1)
    path = tmp_path / "context.snapshot"
    model = Model.open(tiny_package, threads=1)
    warm = 0
    with Mosquitto() as broker:
        settings: dict[str, Any] = {
            "model": {"path": str(tiny_package), "threads": 1},
            "context": {"window": WINDOW, "system": SYSTEM},
            "ask": {"reserve_tokens": 256, "max_tokens": 64},
            "snapshot": {"path": str(path)},
            "mqtt": {"host": broker.host, "port": broker.port, "subscriptions": [{"topic": "home/door/+"}]},
        }
        for n in range(KILLS):
            expected = from_scratch(model, path) if path.exists() else None
            with (
                serving(tmp_path, settings) as process,
                Client(process.wait_ready().target) as client,
                Publisher(broker.host, broker.port) as publisher,
            ):
                status = client.status().engine
                assert status.counters["snapshots_refused"] == 0
                assert status.counters["snapshots_restored"] == (expected is not None)
                if expected is not None:
                    warm += 1
                    assert client.answer(QUESTION, budget_s=30, **GREEDY).text == expected  # type: ignore[arg-type]
                wait_connected(client)
                read_some(client, publisher, n)
                process.send(signal.SIGUSR1)
                time.sleep(rng.uniform(0.0, 0.03))  # a moment by chance is what is tested
                process.kill()
                process.wait()
            if rng.random() < 0.1 or status.context_tokens > WINDOW // 3:  # all events are to stay on hand
                snapshots.clear(path)
    assert warm > KILLS // 4
