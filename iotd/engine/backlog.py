"""What has arrived and is not yet read: a bounded line of readings and frames, and the newest frame of each camera.

Any thread puts, in constant time; the model's thread takes. Knows no model: it never looks inside an event.
"""

import threading
from collections import OrderedDict, deque
from dataclasses import dataclass

from iotd.counters import Counters
from iotd.engine.entry import Image
from iotd.events import RGB, Frame, Observation, Reading


@dataclass(slots=True, eq=False)
class Shot:
    """A frame on its way into the context, shared with the asks that name its camera."""

    camera: str
    time_s: float
    rgb: RGB | None
    """None once `image` has them."""
    image: Image | None = None
    """What the model's thread made of it, so that it is encoded once for all."""


class Backlog:
    """Readings drop their oldest; of each camera only the newest frame waits, in the place of the one it replaces.

    A frame keeps that place because a camera faster than the reading would otherwise never come to its turn.
    """

    def __init__(self, capacity: int, cameras: int, counters: Counters) -> None:
        self._capacity = capacity
        self._max_cameras = cameras
        self._counters = counters
        self._lock = threading.Lock()
        self._line: OrderedDict[int | str, Reading | Shot] = OrderedDict()
        self._readings: deque[int] = deque()
        self._cameras: OrderedDict[str, Shot] = OrderedDict()
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
            key, event = self._line.popitem(last=False)
            if isinstance(key, int):
                self._readings.popleft()
            return event

    def newest(self, camera: str) -> Shot | None:
        """The newest frame of a camera, read already or not."""
        with self._lock:
            return self._cameras.get(camera)

    def cameras(self) -> list[str]:
        """The cameras that are remembered, the one heard last at the end."""
        with self._lock:
            return list(self._cameras)

    def _put_reading(self, reading: Reading) -> None:
        self._counters.add("readings")
        if len(self._readings) >= self._capacity:
            del self._line[self._readings.popleft()]
            self._counters.add("dropped_readings")
        self._n += 1
        self._readings.append(self._n)
        self._line[self._n] = reading

    def _put_frame(self, frame: Frame) -> None:
        self._counters.add("frames")
        shot = Shot(frame.camera, frame.time_s, frame.rgb)
        self._cameras[frame.camera] = shot
        self._cameras.move_to_end(frame.camera)
        if frame.camera in self._line:
            self._counters.add("dropped_frames")
        self._line[frame.camera] = shot
        if len(self._cameras) > self._max_cameras:
            self._forget_camera()

    def _forget_camera(self) -> None:
        camera, _ = self._cameras.popitem(last=False)
        self._counters.add("forgotten_cameras")
        if self._line.pop(camera, None) is not None:
            self._counters.add("dropped_frames")
