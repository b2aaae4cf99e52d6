"""The link with a real mosquitto: what is published arrives, everyone sees whether iotd is there, and it comes back."""

import json
import queue
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from broker import SUBSCRIPTIONS, Linked, Listen, MakeLink, until
from patience import PATIENCE_S

from iotd.config import MqttConfig, SubscriptionConfig
from iotd.demo.broker import Mosquitto, free_port
from iotd.demo.scene import draw, jpeg
from iotd.events import Frame, Observation, Reading
from iotd.mqtt import Link
from iotd.mqtt.publisher import Publisher

pytest_plugins = ("broker",)


def is_now(time_s: float) -> bool:
    """But for the time that an event took to get there."""
    return 0 <= time.time() - time_s < 300


def picture() -> bytes:
    return jpeg(draw(["dog"], np.random.default_rng(0)).rgb)


def test_readings_and_frames_arrive(mosquitto: Mosquitto, link: MakeLink) -> None:
    linked = link(mosquitto.port).connected()
    with Publisher(mosquitto.host, mosquitto.port) as publisher:
        publisher.publish("home/kitchen/temperature", "23.4")
        publisher.publish("home/bath/climate", json.dumps({"temperature": 22, "humidity": 61, "battery": 3}))
        publisher.publish("home/camera/door", picture())
        events = [linked.next() for _ in range(3)]
    readings = {event.source: event.text for event in events if isinstance(event, Reading)}
    frames = [event for event in events if isinstance(event, Frame)]
    assert readings == {"kitchen temperature": "23.4 °C", "bath": "temperature 22 °C, humidity 61 %"}
    assert [(frame.camera, frame.rgb.shape) for frame in frames] == [("door", (160, 160, 3))]


def test_the_status_says_where_and_how(mosquitto: Mosquitto, link: MakeLink) -> None:
    linked = link(mosquitto.port).connected()
    with Publisher(mosquitto.host, mosquitto.port) as publisher:
        publisher.publish("home/a/temperature", "1")
        linked.next()
    until(lambda: linked.link.status().counters["readings"] == 1)
    status = linked.link.status()
    assert (status.connected, status.protocol, status.reconnects) == (True, "5", 0)
    assert status.broker == f"127.0.0.1:{mosquitto.port}"
    assert status.counters["messages"] == 1


def test_everyone_sees_that_it_is_online_and_then_offline(mosquitto: Mosquitto, link: MakeLink, listen: Listen) -> None:
    linked = link(mosquitto.port, node="n").connected()
    assert listen(mosquitto.port, "iotd/n/availability").next() == ("iotd/n/availability", "online", True)
    topic, info, retained = listen(mosquitto.port, "iotd/n/info").next()
    assert (topic, json.loads(info), retained) == ("iotd/n/info", {"version": "1.2"}, True)
    linked.link.stop()
    assert listen(mosquitto.port, "iotd/n/availability").next() == ("iotd/n/availability", "offline", True)


def test_an_abrupt_end_leaves_offline_behind(mosquitto: Mosquitto, listen: Listen) -> None:
    """By the last will, which the broker publishes."""
    script = (
        "import sys, threading; from iotd.config import MqttConfig; from iotd.mqtt import Link\n"
        "Link(MqttConfig(host='127.0.0.1', port=int(sys.argv[1]), node='n'), print).start(); threading.Event().wait()"
    )
    watcher = listen(mosquitto.port, "iotd/n/availability")
    with subprocess.Popen([sys.executable, "-c", script, str(mosquitto.port)]) as process:
        assert watcher.next()[1] == "online"
        process.send_signal(signal.SIGKILL)
        assert watcher.next()[1] == "offline"
    assert listen(mosquitto.port, "iotd/n/availability").next() == ("iotd/n/availability", "offline", True)


def test_it_resumes_after_the_broker_was_killed_and_started_again(
    mosquitto: Mosquitto, link: MakeLink, listen: Listen
) -> None:
    linked = link(mosquitto.port, node="n").connected()
    mosquitto.kill()
    until(lambda: not linked.link.status().connected)
    assert not linked.link.wait_connected(0)
    mosquitto.start()
    linked.connected()
    assert listen(mosquitto.port, "iotd/n/availability").next()[1] == "online"
    with Publisher(mosquitto.host, mosquitto.port) as publisher:
        publisher.publish("home/a/temperature", "5")
        read = linked.next()
        assert (read.source, read.text, is_now(read.time_s)) == ("a temperature", "5 °C", True)
    assert linked.link.status().reconnects == 1


def test_a_broker_that_is_absent_at_the_start_is_waited_for(link: MakeLink) -> None:
    port = free_port()
    linked = link(port)
    assert not linked.link.status().connected
    with Mosquitto(port=port):
        linked.connected()
        linked.link.stop()


def test_stopping_ends_all_threads_with_and_without_a_broker(mosquitto: Mosquitto) -> None:
    before = set(threading.enumerate())
    for port in (mosquitto.port, free_port()):
        linked = Linked(port)
        linked.link.start()
        linked.link.wait_connected(0.1)
        linked.link.stop()
        linked.link.stop()
        assert set(threading.enumerate()) == before
    Linked(1).link.stop()


def test_without_a_host_nothing_starts() -> None:
    link = Link(MqttConfig(), print)
    link.start()
    assert (link.status().connected, link.status().broker) == (False, "")
    link.stop()


def test_overload_drops_the_oldest_and_counts(mosquitto: Mosquitto, link: MakeLink) -> None:
    events: queue.Queue[Observation] = queue.Queue()
    held, gate = threading.Event(), threading.Event()

    def sink(event: Observation) -> None:
        held.set()
        assert gate.wait(PATIENCE_S)
        events.put(event)

    linked = link(mosquitto.port, sink, queue=4).connected()
    with Publisher(mosquitto.host, mosquitto.port) as publisher:
        publisher.publish("home/first/temperature", "0")
        assert held.wait(PATIENCE_S)
        for i in range(1, 51):
            publisher.publish("home/room/temperature", str(i))
            publisher.publish("home/camera/door", picture())
        until(lambda: linked.link.status().counters["messages"] == 101)
    gate.set()
    received = [events.get(timeout=PATIENCE_S) for _ in range(6)]
    texts = [event.text for event in received if isinstance(event, Reading)]
    assert texts == ["0 °C", "47 °C", "48 °C", "49 °C", "50 °C"]
    until(lambda: linked.link.status().counters["frames"] == 1)
    counters = linked.link.status().counters
    assert (counters["dropped_queue_full"], counters["dropped_newer_frame"]) == (46, 49)


def test_bad_payloads_are_counted_and_disturb_nothing(mosquitto: Mosquitto, link: MakeLink) -> None:
    linked = link(mosquitto.port, max_payload_bytes=10_000, max_pixels=100 * 100).connected()
    with Publisher(mosquitto.host, mosquitto.port) as publisher:
        publisher.publish("home/a/temperature", b"\xff\xfe")
        publisher.publish("home/a/climate", "{")
        publisher.publish("home/a/climate", "{}")
        publisher.publish("home/camera/door", b"no image")
        publisher.publish("home/camera/hall", bytes(10_001))
        publisher.publish("home/camera/yard", picture())
        publisher.publish("home/a/temperature", "1")
        read = linked.next()
        assert (read.source, read.text, is_now(read.time_s)) == ("a temperature", "1 °C", True)
    until(lambda: linked.link.status().counters["dropped_too_large"] == 2)
    counted = {name: n for name, n in linked.link.status().counters.items() if name.startswith("dropped") and n}
    assert counted == {
        "dropped_not_utf8": 1,
        "dropped_not_json": 1,
        "dropped_missing_field": 1,
        "dropped_not_image": 1,
        "dropped_too_large": 2,
    }
    assert linked.link.status().reconnects == 0


def test_a_payload_far_too_large_stays_at_the_broker(mosquitto: Mosquitto, link: MakeLink) -> None:
    """MQTT 5's maximum packet size: it costs this side nothing, and the connection holds."""
    linked = link(mosquitto.port, max_payload_bytes=10_000).connected()
    with Publisher(mosquitto.host, mosquitto.port) as publisher:
        publisher.publish("home/camera/door", bytes(3_000_000))
        publisher.publish("home/a/temperature", "1")
        linked.next()
    status = linked.link.status()
    assert (status.counters["messages"], status.reconnects) == (1, 0)


def test_retained_readings_warm_the_context_and_come_once(mosquitto: Mosquitto, link: MakeLink, listen: Listen) -> None:
    with Publisher(mosquitto.host, mosquitto.port) as publisher:
        publisher.publish("home/a/temperature", "7", retain=True)
        publisher.publish("home/camera/door", picture(), retain=True)
        publisher.publish("done", "1", retain=True)
    assert listen(mosquitto.port, "done").next()[1] == "1"
    linked = link(mosquitto.port).connected()
    assert isinstance(event := linked.next(), Reading)
    assert event.text == "7 °C"
    until(lambda: linked.link.status().counters["dropped_retained_frame"] == 1)


def test_overlapping_filters_give_one_reading(mosquitto: Mosquitto, link: MakeLink) -> None:
    """mosquitto sends a message once for each filter under MQTT 5; the first in the list reads it."""
    filters = [("home/+/t", "first"), ("home/#", "rest"), ("+/a/t", "third")]
    linked = link(mosquitto.port, subscriptions=[SubscriptionConfig(topic=t, label=name) for t, name in filters])
    linked.connected()
    with Publisher(mosquitto.host, mosquitto.port) as publisher:
        for text in ("1", "1", "2"):
            publisher.publish("home/a/t", text)
        publisher.publish("home/a/x", "3")
        events = [linked.next() for _ in range(4)]
    assert [(e.source, e.text) for e in events if isinstance(e, Reading)] == [
        ("first", "1"),
        ("first", "1"),
        ("first", "2"),
        ("rest", "3"),
    ]


def test_nodes_of_one_share_split_the_messages(mosquitto: Mosquitto, link: MakeLink) -> None:
    share = [SubscriptionConfig(topic="$share/fleet/home/+/t")]
    both = [link(mosquitto.port, node=node, subscriptions=share).connected() for node in ("a", "b")]
    with Publisher(mosquitto.host, mosquitto.port) as publisher:
        for i in range(10):
            publisher.publish(f"home/{i}/t", str(i))
    until(lambda: sum(linked.events.qsize() for linked in both) == 10)
    shares = [[linked.next() for _ in range(linked.events.qsize())] for linked in both]
    assert all(shares)
    assert sorted(event.text for part in shares for event in part if isinstance(event, Reading)) == [*"0123456789"]


def test_changed_subscriptions_apply_without_a_new_connection(mosquitto: Mosquitto, link: MakeLink) -> None:
    linked = link(mosquitto.port).connected()
    linked.link.reconfigure([SUBSCRIPTIONS[0], SubscriptionConfig(topic="new", label="new")])
    linked.connected()
    with Publisher(mosquitto.host, mosquitto.port) as publisher:
        publisher.publish("home/a/climate", '{"temperature": 1}')
        publisher.publish("new", "1")
        publisher.publish("home/a/temperature", "2")
        events = [linked.next() for _ in range(2)]
    assert [event.text for event in events if isinstance(event, Reading)] == ["1", "2 °C"]
    assert linked.link.status().counters["messages"] == 2
    assert linked.link.status().reconnects == 0


def test_changed_subscriptions_hold_after_a_restart_of_the_broker(mosquitto: Mosquitto, link: MakeLink) -> None:
    linked = link(mosquitto.port).connected()
    mosquitto.kill()
    until(lambda: not linked.link.status().connected)
    linked.link.reconfigure([SubscriptionConfig(topic="new", label="new")])
    mosquitto.start()
    linked.connected()
    with Publisher(mosquitto.host, mosquitto.port) as publisher:
        publisher.publish("new", "1")
        read = linked.next()
        assert (read.source, read.text, is_now(read.time_s)) == ("new", "1", True)


def test_a_second_daemon_with_the_same_name_is_named_in_the_log(
    mosquitto: Mosquitto, link: MakeLink, caplog: pytest.LogCaptureFixture
) -> None:
    link(mosquitto.port, node="same").connected()
    link(mosquitto.port, node="same").connected()
    until(lambda: "mqtt.client_id" in caplog.text)
