"""The way in is bounded in every direction: the newest wins, drops are counted, and nothing bad disturbs the rest."""

import logging
import queue
import threading
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import pytest
from patience import PATIENCE_S

from iotd.config import MqttConfig, SubscriptionConfig
from iotd.events import MAX_CAMERAS, Frame, Observation, Reading
from iotd.ingest import Intake, Routes
from iotd.ingest.inbox import FRAME_EVERY, Inbox, Message
from iotd.ingest.parse import MAX_TEXT_BYTES
from iotd.ingest.quiet_log import QuietLog
from iotd.ingest.recall import Recall
from iotd.ingest.routes import Route

SUBSCRIPTIONS = [
    SubscriptionConfig(topic="t/+"),
    SubscriptionConfig(topic="slow/+", min_interval_s=10),
    SubscriptionConfig(topic="slow/json/+", kind="json", min_interval_s=10),
    SubscriptionConfig(topic="j/+", kind="json", fields={"t": "°C"}),
    SubscriptionConfig(topic="c/+", kind="image"),
    SubscriptionConfig(topic="t/#", label="later"),
]


class Sink:
    """Keeps events; holds the intake's thread while `gate` is closed."""

    def __init__(self) -> None:
        self.events: queue.Queue[Observation] = queue.Queue()
        self.gate = threading.Event()
        self.gate.set()
        self.held = threading.Event()

    def __call__(self, event: Observation) -> None:
        self.held.set()
        assert self.gate.wait(PATIENCE_S)
        self.events.put(event)

    def next(self) -> Observation:
        return self.events.get(timeout=PATIENCE_S)

    def texts(self, n: int) -> list[str]:
        return [event.text if isinstance(event := self.next(), Reading) else event.camera for _ in range(n)]


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
def intake(sink: Sink) -> Iterator[Intake]:
    made = Intake(MqttConfig(host="x", queue=4, max_payload_bytes=200_000, subscriptions=SUBSCRIPTIONS), sink)
    made.start()
    yield made
    sink.gate.set()
    made.stop()


def jpeg(shade: int = 128) -> bytes:
    return cv2.imencode(".jpg", np.full((32, 32, 3), shade, np.uint8))[1].tobytes()


def hold(intake: Intake, sink: Sink) -> None:
    """Occupy the intake's thread with one reading."""
    sink.gate.clear()
    intake.offer("t/hold", b"held", 0.0)
    assert sink.held.wait(PATIENCE_S)


def test_a_reading_keeps_its_label_its_text_and_its_time(intake: Intake, sink: Sink) -> None:
    intake.offer("t/kitchen", b"23.4", 12.5)
    assert sink.next() == Reading("kitchen", "23.4", 12.5)


def test_a_frame_keeps_its_camera_and_its_time(intake: Intake, sink: Sink) -> None:
    intake.offer("c/door", jpeg(), 3.0)
    frame = sink.next()
    assert isinstance(frame, Frame)
    assert (frame.camera, frame.time_s, frame.rgb.shape) == ("door", 3.0, (32, 32, 3))


def test_of_readings_that_wait_the_oldest_are_dropped_and_counted(intake: Intake, sink: Sink) -> None:
    hold(intake, sink)
    for i in range(10):
        intake.offer(f"t/{i}", str(i).encode(), 0.0)
    sink.gate.set()
    assert sink.texts(5) == ["held", "6", "7", "8", "9"]
    assert intake.counters["dropped_queue_full"] == 6


def test_of_a_cameras_frames_the_newest_wins(intake: Intake, sink: Sink) -> None:
    hold(intake, sink)
    for shade in (10, 100, 200):
        intake.offer("c/door", jpeg(shade), float(shade))
    intake.offer("c/garden", jpeg(), 1.0)
    sink.gate.set()
    assert sink.texts(1) == ["held"]
    assert [(f.camera, f.time_s) for f in (sink.next(), sink.next()) if isinstance(f, Frame)] == [
        ("door", 200.0),
        ("garden", 1.0),
    ]
    assert intake.counters["dropped_newer_frame"] == 2


@pytest.mark.parametrize(
    ("topic", "payload", "kind"),
    [
        ("t/a", b"\xff", "not_utf8"),
        ("t/a", b"", "empty"),
        ("t/a", b"x" * (MAX_TEXT_BYTES + 1), "too_large"),
        ("j/a", b"{", "not_json"),
        ("j/a", b'{"u": 1}', "missing_field"),
        ("c/a", b"hello", "not_image"),
        ("c/a", bytes(200_001), "too_large"),
        ("other", b"1", "unrouted"),
    ],
)
def test_a_bad_payload_is_counted_and_nothing_else_disturbed(
    intake: Intake, sink: Sink, topic: str, payload: bytes, kind: str
) -> None:
    intake.offer(topic, payload, 0.0)
    intake.offer("t/good", b"good", 0.0)
    assert sink.texts(1) == ["good"]
    intake.stop()
    counted = {name: n for name, n in intake.counters.items() if n}
    assert counted == {"messages": 2, "readings": 1, f"dropped_{kind}": 1}


def test_a_bad_payload_is_logged_once_for_each_topic(
    intake: Intake, sink: Sink, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(4):
        intake.offer("j/a", b"{", 0.0)
    intake.offer("j/b\x1b[2J", b"3", 0.0)
    intake.offer("t/good", b"good", 0.0)
    assert sink.texts(1) == ["good"]
    assert [record.message.split(":")[0] for record in caplog.records] == ["j/a", "j/b [2J"]


def test_a_topic_that_speaks_too_often_is_held_to_its_interval(intake: Intake, sink: Sink) -> None:
    for time_s in (100.0, 101.0, 109.9):
        intake.offer("slow/a", str(time_s).encode(), time_s)
    assert sink.texts(1) == ["100.0"]
    intake.offer("slow/b", b"b", 101.0)
    intake.offer("slow/a", b"110.0", 110.0)
    assert sink.texts(2) == ["b", "110.0"]
    assert intake.counters["dropped_min_interval"] == 2


def test_the_interval_holds_for_messages_that_wait_together(intake: Intake, sink: Sink) -> None:
    hold(intake, sink)
    for time_s in (100.0, 101.0, 110.0):
        intake.offer("slow/a", str(time_s).encode(), time_s)
    sink.gate.set()
    assert sink.texts(3) == ["held", "100.0", "110.0"]
    assert intake.counters["dropped_min_interval"] == 1


@pytest.mark.parametrize("bad", [b"garbage", b"{}", b"x" * (MAX_TEXT_BYTES + 1)], ids=["no JSON", "no field", "large"])
def test_a_bad_payload_does_not_hold_back_the_next_good_one(intake: Intake, sink: Sink, bad: bytes) -> None:
    intake.offer("slow/json/a", bad, 100.0)
    intake.offer("slow/json/a", b'{"a": 1}', 101.0)
    intake.offer("slow/json/a", b'{"a": 2}', 102.0)
    intake.offer("t/a", b"end", 102.0)
    assert sink.texts(2) == ["a 1", "end"]
    assert intake.counters["dropped_min_interval"] == 1


def test_frames_are_kept_no_larger_than_they_are_wanted(sink: Sink) -> None:
    intake = Intake(MqttConfig(subscriptions=SUBSCRIPTIONS), sink, keep_pixels=400)
    intake.start()
    intake.offer("c/door", jpeg(), 0.0)
    frame = sink.next()
    intake.stop()
    assert isinstance(frame, Frame)
    assert frame.rgb.shape == (20, 20, 3)


def test_a_clock_that_was_set_back_does_not_silence_a_topic(intake: Intake, sink: Sink) -> None:
    intake.offer("slow/a", b"before", 5000.0)
    intake.offer("slow/a", b"after", 1000.0)
    assert sink.texts(2) == ["before", "after"]


def test_a_retained_reading_is_taken_once(intake: Intake, sink: Sink) -> None:
    """It is the last known value; the same one again, after a reconnect, is no news."""
    intake.offer("t/door", b"open", 0.0, retained=True)
    intake.offer("t/door", b"open", 60.0, retained=True)
    intake.offer("t/door", b"open", 61.0)
    intake.offer("t/door", b"closed", 62.0, retained=True)
    assert sink.texts(3) == ["open", "open", "closed"]
    assert intake.counters["dropped_repeated"] == 1


def test_a_retained_frame_is_dropped(intake: Intake, sink: Sink) -> None:
    """A picture of unknown age would pass for the present."""
    intake.offer("c/door", jpeg(), 0.0, retained=True)
    intake.offer("t/a", b"a", 0.0)
    assert sink.texts(1) == ["a"]
    assert intake.counters["dropped_retained_frame"] == 1


def test_copies_for_overlapping_filters_are_one_reading(intake: Intake, sink: Sink) -> None:
    intake.offer("t/a", b"1", 0.0, via=("t/#",))
    intake.offer("t/a", b"2", 0.0, via=("t/+",))
    intake.offer("t/a", b"3", 1.0, via=("t/#", "t/+"))
    assert sink.texts(2) == ["2", "3"]
    assert intake.counters["dropped_overlap"] == 1


def test_copies_are_one_reading_too_where_the_broker_does_not_say(intake: Intake, sink: Sink) -> None:
    intake.offer("t/a", b"1", 0.0)
    intake.offer("t/a", b"1", 0.01)
    intake.offer("t/a", b"1", 5.0)
    intake.offer("j/a", b'{"t": 1}', 5.0)
    intake.offer("j/a", b'{"t": 1}', 5.0)
    assert sink.texts(4) == ["1", "1", "t 1 °C", "t 1 °C"]


def test_a_sink_that_raises_loses_one_event_only(caplog: pytest.LogCaptureFixture) -> None:
    events: queue.Queue[Observation] = queue.Queue()

    def sink(event: Observation) -> None:
        if isinstance(event, Reading) and event.text == "bad":
            raise RuntimeError("defect")
        events.put(event)

    intake = Intake(MqttConfig(subscriptions=SUBSCRIPTIONS), sink)
    intake.start()
    intake.offer("t/a", b"bad", 0.0)
    intake.offer("t/a", b"good", 0.0)
    assert events.get(timeout=PATIENCE_S) == Reading("a", "good", 0.0)
    intake.stop()
    assert intake.counters["dropped_defect"] == 1
    assert "lost to a defect" in caplog.text


def test_new_routes_hold_from_the_next_message_on(intake: Intake, sink: Sink) -> None:
    intake.reroute(Routes([SubscriptionConfig(topic="t/+", label="new {1}")]))
    intake.offer("t/a", b"1", 0.0)
    intake.offer("j/a", b'{"t": 1}', 0.0)
    assert sink.next() == Reading("new a", "1", 0.0)
    assert intake.counters["dropped_unrouted"] == 1


def test_the_intake_stops_while_its_queue_is_full(intake: Intake, sink: Sink) -> None:
    hold(intake, sink)
    for i in range(4):
        intake.offer("t/a", str(i).encode(), 0.0)
    sink.gate.set()
    intake.stop()
    intake.stop()
    intake.offer("t/a", b"late", 0.0)
    assert "iotd-ingest" not in [thread.name for thread in threading.enumerate()]


def message(label: str, nbytes: int = 1) -> Message:
    return Message(label, bytes(nbytes), 0.0, Route(SubscriptionConfig(topic="#"), label, False))


def test_the_mailbox_is_bounded_in_cameras_and_in_bytes() -> None:
    inbox = Inbox(max_readings=4, max_frame_nbytes=1000)
    n_dropped = sum(inbox.put_frame(message(str(i))) for i in range(MAX_CAMERAS + 10))
    assert (n_dropped, len(inbox)) == (10, MAX_CAMERAS)
    assert inbox.put_frame(message("large", 990)) == MAX_CAMERAS - 10
    assert inbox.put_frame(message("alone", 5000)) == 11
    assert len(inbox) == 1


def test_neither_frames_nor_readings_starve() -> None:
    inbox = Inbox(max_readings=100, max_frame_nbytes=1000)
    for i in range(FRAME_EVERY + 5):
        inbox.put_reading(message(f"r{i}"))
    inbox.put_frame(message("frame"))
    order = [taken.route.label for _ in range(FRAME_EVERY + 6) if (taken := inbox.take())]
    assert order.index("frame") == FRAME_EVERY


def test_the_memory_of_topics_is_bounded() -> None:
    recall = Recall(max_topics=3)
    for topic in "abcd":
        recall.remember(topic, b"1", 0.0)
    assert [topic for topic in "abcd" if recall.repeats(topic, b"1")] == ["b", "c", "d"]


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def quiet() -> Iterator[tuple[Callable[[float, str], None], list[str]]]:
    """A log with a manual clock, which remembers two keys: (time_s, key) → lines."""
    logger, handler, now_s = logging.getLogger("iotd.test"), Lines(), [0.0]
    logger.addHandler(handler)
    log = QuietLog(logger, lambda: now_s[0], capacity=2)

    def say(time_s: float, key: str) -> None:
        now_s[0] = time_s
        log.warning(key, key)

    yield say, handler.lines
    logger.removeHandler(handler)


def test_the_log_has_one_line_for_each_key_and_minute(quiet: tuple[Callable[[float, str], None], list[str]]) -> None:
    say, lines = quiet
    for time_s, key in ((0, "a"), (1, "a"), (2, "b"), (59, "a"), (60, "a"), (61, "b")):
        say(time_s, key)
    assert lines == ["a", "b", "a (2 more like it since the last line)"]


def test_the_log_is_silent_about_more_keys_than_it_remembers(
    quiet: tuple[Callable[[float, str], None], list[str]],
) -> None:
    say, lines = quiet
    for i, key in enumerate("abcdefgh"):
        say(float(i), key)
    say(100.0, "h")
    assert lines == ["a", "b", "h"]
