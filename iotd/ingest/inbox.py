"""What waits to be parsed: a bounded queue of readings, and a mailbox in which each camera's newest frame wins.

Knows no payload format; bounded in messages and in bytes, whatever is put in.
"""

import threading
from collections import OrderedDict, deque
from dataclasses import dataclass

from iotd.events import MAX_CAMERAS
from iotd.ingest.routes import Route

FRAME_EVERY = 16
"""A waiting frame goes first after so many readings: decoding is slow, and must neither starve nor be starved."""


@dataclass(frozen=True, slots=True)
class Message:
    """A payload that found its route."""

    topic: str
    payload: bytes
    time_s: float
    route: Route


class Inbox:
    """Any thread puts, one takes. Putting never blocks for longer than the lock is held."""

    def __init__(self, *, max_readings: int, max_frame_nbytes: int) -> None:
        self._max_readings = max_readings
        self._max_frame_nbytes = max_frame_nbytes
        self._readings: deque[Message] = deque()
        self._frames: OrderedDict[str, Message] = OrderedDict()
        self._frame_nbytes = 0
        self._readings_in_a_row = 0
        self._closed = False
        self._changed = threading.Condition()

    def put_reading(self, message: Message) -> int:
        """Returns how many readings were dropped for it: the oldest go."""
        with self._changed:
            self._readings.append(message)
            n_dropped = 0
            while len(self._readings) > self._max_readings:
                self._readings.popleft()
                n_dropped += 1
            self._changed.notify()
        return n_dropped

    def put_frame(self, message: Message) -> int:
        """Returns how many frames were dropped for it: the camera's older one, or those of others that wait longest.

        Of MAX_CAMERAS cameras a frame can wait at once.
        """
        with self._changed:
            n_before = len(self._frames) + 1
            self._remove_frame(message.route.label)
            self._frames[message.route.label] = message
            self._frame_nbytes += len(message.payload)
            while len(self._frames) > 1 and self._too_many_frames():
                self._remove_frame(next(iter(self._frames)))
            self._changed.notify()
            return n_before - len(self._frames)

    def take(self) -> Message | None:
        """The next message; waits for one. None once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._readings or self._frames)
            if self._closed:
                return None
            if self._frames and (not self._readings or self._readings_in_a_row >= FRAME_EVERY):
                self._readings_in_a_row = 0
                return self._remove_frame(next(iter(self._frames)))
            self._readings_in_a_row += 1
            return self._readings.popleft()

    def close(self) -> None:
        """What still waits is let go."""
        with self._changed:
            self._closed = True
            self._readings.clear()
            self._frames.clear()
            self._frame_nbytes = 0
            self._changed.notify_all()

    def __len__(self) -> int:
        with self._changed:
            return len(self._readings) + len(self._frames)

    def _too_many_frames(self) -> bool:
        return len(self._frames) > MAX_CAMERAS or self._frame_nbytes > self._max_frame_nbytes

    def _remove_frame(self, camera: str) -> Message | None:
        message = self._frames.pop(camera, None)
        if message:
            self._frame_nbytes -= len(message.payload)
        return message
