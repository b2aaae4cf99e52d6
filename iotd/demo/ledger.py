"""What the home has told, now and a moment ago: which questions have one true answer, whatever is still on its way.

Knows neither the broker nor the daemon. The home's thread fills it, the asker's reads it.
"""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Collection

from iotd.demo.devices import Report
from iotd.demo.home import ROOMS
from iotd.demo.questions import APPLIANCES, FORMS, Question, Told, draw_question
from iotd.demo.scene import Scene

SETTLED_S = 1.0
"""A reading is with the model after this time."""


class Ledger:
    """`Told`, and what it was in the last SETTLED_S."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, camera: bool = True) -> None:
        """camera: whether the home has one."""
        self._clock = clock
        self._camera = camera
        self._lock = threading.Lock()
        self._told = Told()
        self._before: deque[tuple[float, Told]] = deque()
        """Until when each was so."""

    def tell(self, message: Report | Scene) -> None:
        """The home has sent this."""
        with self._lock:
            self._forget()
            self._before.append((self._clock(), self._told.copy()))
            if isinstance(message, Scene):
                self._told.look(message)
            else:
                self._told.hear(message)

    def question(self, rng: random.Random, kinds: Collection[str], forms: Collection[str] = FORMS) -> Question | None:
        """One of these kinds and forms, in plain words or in some that training never used.

        None where its answer has changed in the last SETTLED_S, or the home had not told everything by then.
        """
        with self._lock:
            self._forget()
            tolds = [*(told for _, told in self._before), self._told.copy()]
        if not all(map(self._is_whole, tolds)):
            return None
        seed, weights = rng.random(), dict.fromkeys(kinds, 1.0)
        drawn = {
            draw_question(told, random.Random(seed), held_out=True, weights=weights, forms=forms) for told in tolds
        }
        return drawn.pop() if len(drawn) == 1 else None

    def _forget(self) -> None:
        while self._before and self._before[0][0] < self._clock() - SETTLED_S:
            self._before.popleft()

    def _is_whole(self, told: Told) -> bool:
        """Whether every device has spoken: doors and motion sensors are the first to do so."""
        warm, powered = told.sensors("temperature"), told.sensors("power")
        seen = told.scene is not None or not self._camera
        return seen and warm.keys() >= {*ROOMS} and powered.keys() >= {*APPLIANCES}
