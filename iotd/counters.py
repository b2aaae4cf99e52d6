"""Monotonic counts since start, added to from any thread. Knows nothing of what it counts."""

import threading
from collections.abc import Iterable


class Counters:
    """A fixed set of counts: `names` stand in every snapshot from the start, at 0."""

    def __init__(self, names: Iterable[str]) -> None:
        self._counts = dict.fromkeys(names, 0)
        self._lock = threading.Lock()

    def add(self, name: str, n: int = 1) -> None:
        """Raises KeyError for a name it was not made with: a typo must not make a new series."""
        with self._lock:
            self._counts[name] += n

    def snapshot(self) -> dict[str, int]:
        """A copy, consistent in itself."""
        with self._lock:
            return dict(self._counts)
