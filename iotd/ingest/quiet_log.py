"""A log for what a stranger can cause: one line for each key and minute, and so many lines a minute in all."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable


class QuietLog:
    """Lets one line per key through in `interval_s`; remembers at most `capacity` keys.

    While `capacity` keys were heard of within the interval, further ones are silent: neither the log nor the memory
    grows with the number of topics.
    """

    def __init__(
        self, logger: logging.Logger, clock: Callable[[], float], *, interval_s: float = 60.0, capacity: int = 128
    ) -> None:
        self._logger = logger
        self._clock = clock
        self._interval_s = interval_s
        self._capacity = capacity
        self._logged_s: OrderedDict[str, float] = OrderedDict()
        self._silenced: dict[str, int] = {}
        self._lock = threading.Lock()

    def warning(self, key: str, message: str, *, exc_info: bool = False) -> None:
        with self._lock:
            n_silenced = self._admit(key)
        if n_silenced is not None:
            more = f" ({n_silenced} more like it since the last line)" if n_silenced else ""
            self._logger.warning("%s%s", message, more, exc_info=exc_info)

    def _admit(self, key: str) -> int | None:
        """How many lines were held back before this one; None holds this one back too."""
        now = self._clock()
        last = self._logged_s.get(key)
        if last is not None and now - last < self._interval_s:
            self._silenced[key] = self._silenced.get(key, 0) + 1
            return None
        if last is None and not self._make_room(now):
            return None
        self._logged_s[key] = now
        self._logged_s.move_to_end(key)
        return self._silenced.pop(key, 0)

    def _make_room(self, now: float) -> bool:
        if len(self._logged_s) < self._capacity:
            return True
        oldest, logged_s = next(iter(self._logged_s.items()))
        if now - logged_s < self._interval_s:
            return False
        del self._logged_s[oldest]
        self._silenced.pop(oldest, None)
        return True
