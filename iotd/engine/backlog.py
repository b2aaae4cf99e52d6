"""What has arrived and is not yet read: a bounded line of readings and frames, and the newest frame of each camera.

Any thread puts, in constant time; the model's thread takes. Knows no model: it never looks inside an event.
"""

import threading
from collections import OrderedDict, deque
from dataclasses import dataclass

from iotd.counters import Counters
from iotd.engine.entry import Image
from iotd.events import FORGOTTEN, RGB, CameraStatus, Frame, Observation, Reading


@dataclass(slots=True, eq=False)
class Shot:
    """A frame on its way into the context, shared with the asks that name its camera."""

    camera: str
    time_s: float
    rgb: RGB | None
    """None once `image` has them."""
    image: Image | None = None
    """What the model's thread made of it, so that it is encoded once for all."""


@dataclass(slots=True)
class _Camera:
    """A camera's newest frame, and what came of all of them."""

    newest: Shot | None = None
    frames: int = 0
    replaced: int = 0
    refused: int = 0


class Backlog:
    """Of each camera only the newest frame waits; of each sensor its newest reading alone, once it is half full.

    What is newer takes the place of what it replaces: a camera or a sensor faster than the reading would otherwise
    never come to its turn. Where even that does not do, the oldest reading is dropped.
    """

    def __init__(self, capacity: int, cameras: int, counters: Counters) -> None:
        self._capacity = capacity
        self._max_cameras = cameras
        self._counters = counters
        self._lock = threading.Lock()
        self._line: OrderedDict[int | str, Reading | Shot] = OrderedDict()
        self._readings: deque[int] = deque()
        self._sensors: dict[str, int] = {}
        """Where the newest reading of each sensor waits."""
        self._n_skipped = 0
        self._cameras: OrderedDict[str, _Camera] = OrderedDict()
        self._forgotten = _Camera()
        self._n = 0

    def __len__(self) -> int:
        return len(self._line)

    def put(self, observation: Observation) -> None:
        """Add one event to the line; what has to make room for it is counted as dropped."""
        with self._lock:
            if isinstance(observation, Reading):
                self._put_reading(observation)
            else:
                self._put_frame(observation)

    def take(self) -> Reading | Shot | None:
        """The event whose turn it is, or None."""
        with self._lock:
            if not self._line:
                return None
            _, event = self._line.popitem(last=False)
            if isinstance(event, Reading):
                self._forget_reading(self._readings.popleft(), event)
            return event

    def take_skipped(self) -> int:
        """Readings that will never be read, since this was asked last."""
        with self._lock:
            n, self._n_skipped = self._n_skipped, 0
            return n

    def newest(self, camera: str) -> Shot | None:
        """The newest frame of a camera, read already or not."""
        with self._lock:
            known = self._cameras.get(camera)
            return None if known is None else known.newest

    def turn_away(self, frame: Frame) -> None:
        """Count a frame that no model here can see."""
        self._counters.add("refused_frames")
        with self._lock:
            self._counters.add("frames")
            self._heard(frame.camera).refused += 1

    def refuse(self, camera: str) -> None:
        """A frame that was taken does not fit into the context."""
        self._counters.add("refused_frames")
        with self._lock:
            self._cameras.get(camera, self._forgotten).refused += 1

    def cameras(self) -> list[CameraStatus]:
        """The cameras that are remembered, the one heard last at the end; before them FORGOTTEN, for all others."""
        with self._lock:
            known = [(FORGOTTEN, self._forgotten)] if self._forgotten.frames else []
            return [
                CameraStatus(name, c.newest.time_s if c.newest else 0.0, c.frames, c.replaced, c.refused)
                for name, c in (*known, *self._cameras.items())
            ]

    def _put_reading(self, reading: Reading) -> None:
        self._counters.add("readings")
        place = self._sensors.get(reading.source)
        if place is not None and len(self._readings) >= self._capacity // 2:
            self._line[place] = reading
            self._skip("coalesced_readings")
            return
        if len(self._readings) >= self._capacity:
            oldest = self._readings.popleft()
            self._forget_reading(oldest, self._line.pop(oldest))
            self._skip("dropped_readings")
        self._n += 1
        self._readings.append(self._n)
        self._sensors[reading.source] = self._n
        self._line[self._n] = reading

    def _forget_reading(self, place: int, event: Reading | Shot) -> None:
        assert isinstance(event, Reading)
        if self._sensors[event.source] == place:
            del self._sensors[event.source]

    def _skip(self, count: str) -> None:
        self._n_skipped += 1
        self._counters.add(count)

    def _put_frame(self, frame: Frame) -> None:
        self._counters.add("frames")
        shot = Shot(frame.camera, frame.time_s, frame.rgb)
        camera = self._heard(frame.camera)
        camera.newest = shot
        if frame.camera in self._line:
            camera.replaced += 1
            self._counters.add("dropped_frames")
        self._line[frame.camera] = shot

    def _heard(self, name: str) -> _Camera:
        """The camera that has sent one more frame; one too many, and the one silent for longest is forgotten."""
        camera = self._cameras.setdefault(name, _Camera())
        camera.frames += 1
        self._cameras.move_to_end(name)
        if len(self._cameras) > self._max_cameras:
            self._forget_camera()
        return camera

    def _forget_camera(self) -> None:
        name, camera = self._cameras.popitem(last=False)
        self._counters.add("forgotten_cameras")
        if self._line.pop(name, None) is not None:
            camera.replaced += 1
            self._counters.add("dropped_frames")
        self._forgotten.frames += camera.frames
        self._forgotten.replaced += camera.replaced
        self._forgotten.refused += camera.refused
