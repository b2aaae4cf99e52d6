"""What waits to be read: bounded, the newest kept, every drop counted."""

from engine_driver import frame, image, reading
from hypothesis import given
from hypothesis import strategies as st

from iotd.counters import Counters
from iotd.engine.backlog import Backlog, Shot
from iotd.engine.engine import COUNTS
from iotd.events import FORGOTTEN, CameraStatus, Frame, Reading


def backlog(capacity: int = 4, cameras: int = 2) -> tuple[Backlog, Counters]:
    counters = Counters(COUNTS)
    return Backlog(capacity, cameras, counters), counters


def drain(line: Backlog) -> list[str]:
    found = []
    while (event := line.take()) is not None:
        found.append(event.text if isinstance(event, Reading) else f"{event.camera}@{event.time_s:.0f}")
    return found


def test_events_leave_in_the_order_they_came() -> None:
    line, _ = backlog()
    line.put(reading(0))
    line.put(Frame("door", image(), 5))
    line.put(reading(1))
    assert drain(line) == ["on0", "door@5", "on1"]


def test_one_reading_too_many_drops_the_oldest_and_counts_it() -> None:
    line, counters = backlog(capacity=4)
    for n in range(10):
        line.put(reading(n, source=f"s{n}"))
    assert drain(line) == ["on6", "on7", "on8", "on9"]
    assert counters.snapshot()["readings"] == 10
    assert counters.snapshot()["dropped_readings"] == 6


def test_once_it_is_half_full_a_sensors_newer_reading_takes_the_place_of_the_one_that_waits() -> None:
    line, counters = backlog(capacity=6)
    for n in range(3):
        line.put(reading(n, source="door"))
    line.put(reading(3, source="hall"))
    line.put(reading(4, source="door"))
    line.put(reading(5, source="hall"))
    assert drain(line) == ["on0", "on1", "on4", "on5"]
    counted = counters.snapshot()
    assert (counted["coalesced_readings"], counted["dropped_readings"]) == (2, 0)
    assert line.take_skipped() == 2
    assert line.take_skipped() == 0


def test_a_flood_of_one_sensor_leaves_room_for_all_others() -> None:
    line, counters = backlog(capacity=8)
    for n in range(100):
        line.put(reading(n, source="flood"))
    for n in range(4):
        line.put(reading(n, source=f"quiet{n}"))
    assert drain(line)[-5:] == ["on99", "on0", "on1", "on2", "on3"]
    assert counters.snapshot()["dropped_readings"] == 0


def test_a_newer_frame_takes_the_place_of_the_one_that_waits() -> None:
    line, counters = backlog()
    line.put(Frame("door", image(), 1))
    line.put(reading(0))
    line.put(Frame("door", image(), 2))
    assert drain(line) == ["door@2", "on0"]
    assert counters.snapshot()["dropped_frames"] == 1


def test_dropped_readings_never_take_a_frame_with_them() -> None:
    line, _ = backlog(capacity=2)
    line.put(Frame("door", image(), 1))
    for n in range(9):
        line.put(reading(n, source=f"s{n}"))
    assert drain(line) == ["door@1", "on7", "on8"]


def test_the_newest_frame_of_a_camera_stays_known_after_it_was_read() -> None:
    line, _ = backlog()
    line.put(Frame("door", image(), 1))
    shot = line.take()
    assert isinstance(shot, Shot)
    assert line.newest("door") is shot
    assert line.newest("garden") is None


def test_the_camera_silent_for_longest_is_forgotten() -> None:
    line, counters = backlog(cameras=2)
    for camera in ("a", "b", "a", "c"):
        line.put(frame(1, camera))
    assert [known.camera for known in line.cameras()] == [FORGOTTEN, "a", "c"]
    assert line.newest("b") is None
    assert counters.snapshot()["forgotten_cameras"] == 1
    assert counters.snapshot()["dropped_frames"] == 2


@given(st.lists(st.sampled_from("rsabct")), st.integers(1, 4), st.integers(1, 3))
def test_nothing_is_lost_uncounted(steps: str, capacity: int, cameras: int) -> None:
    line, counters = backlog(capacity, cameras)
    taken = 0
    for n, step in enumerate(steps):
        if step == "t":
            taken += line.take() is not None
        else:
            line.put(reading(n, source=step) if step in "rs" else frame(n, step))
        assert len(line) <= capacity + cameras
        assert len(line.cameras()) <= cameras + 1
    counted = counters.snapshot()
    skipped = counted["dropped_readings"] + counted["coalesced_readings"]
    dropped = skipped + counted["dropped_frames"]
    assert line.take_skipped() == skipped
    assert counted["frames"] == sum(camera.frames for camera in line.cameras())
    assert counted["dropped_frames"] == sum(camera.replaced for camera in line.cameras())
    assert counted["readings"] + counted["frames"] == taken + dropped + len(line)


def test_what_came_of_each_cameras_frames_is_counted_until_it_is_forgotten() -> None:
    line, _ = backlog(cameras=2)
    for time_s in (5, 6, 7):
        line.put(Frame("door", image(), time_s))
    line.refuse("door")
    line.put(Frame("yard", image(), 8))
    assert line.cameras() == [CameraStatus("door", 7, 3, 2, 1), CameraStatus("yard", 8, 1, 0, 0)]
    line.put(Frame("hall", image(), 9))
    line.refuse("door")
    line.turn_away(Frame("yard", image(), 10))
    assert line.cameras() == [
        CameraStatus(FORGOTTEN, 0.0, 3, 3, 2),
        CameraStatus("hall", 9, 1, 0, 0),
        CameraStatus("yard", 8, 2, 0, 1),
    ]
