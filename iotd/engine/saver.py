"""Saving the context while the engine works: a copy is taken between two units of work, and written by another thread.

Knows neither where a snapshot goes nor what is in it.
"""

import logging
import threading
from collections.abc import Callable

from iotd.counters import Counters
from iotd.engine.context import Context
from iotd.engine.snapshot import Snapshot
from iotd.errors import IotdError

log = logging.getLogger(__name__)

Write = Callable[[Snapshot], None]
"""Puts a snapshot where it lasts. Raises OSError or IotdError where it cannot."""


class Saver:
    """One save at a time. Any thread asks for it; the model's thread begins it."""

    def __init__(self, context: Context, counters: Counters, resume: Callable[[], None]) -> None:
        """resume: called once the context can be read into again."""
        self._context = context
        self._counters = counters
        self._resume = resume
        self._wanted: Write | None = None
        self._writer: threading.Thread | None = None

    def ask(self, write: Write) -> None:
        """Save soon. One that waits already is replaced."""
        self._wanted = write

    def turn(self) -> None:
        """Begin a save that was asked for, unless the context is between two states. On the model's thread."""
        write = self._wanted
        if write is None or self._context.busy or self._context.frozen:
            return
        self._wanted = None
        snapshot = self._context.freeze()
        self._writer = threading.Thread(target=self._write, args=(write, snapshot), name="iotd-saver", daemon=True)
        self._writer.start()

    def finish(self, last: Callable[[], Snapshot], write: Write | None, timeout_s: float) -> None:
        """Wait for the save under way, then save what there is now. The model's thread has ended."""
        if self._writer is not None:
            self._writer.join(timeout_s)
            if self._writer.is_alive():
                log.error("the context was not saved within %g s", timeout_s)
                return
        if write is not None:
            self._put(write, last())

    def _write(self, write: Write, snapshot: Snapshot) -> None:
        self._put(write, snapshot)
        self._context.thaw()
        self._resume()

    def _put(self, write: Write, snapshot: Snapshot) -> None:
        try:
            write(snapshot)
        except (OSError, IotdError) as error:
            self._counters.add("snapshots_failed")
            log.warning("the context was not saved: %s", error)
        except Exception:
            self._counters.add("snapshots_failed")
            log.exception("the context was not saved")
        else:
            self._counters.add("snapshots_saved")
            log.info("context saved", extra={"tokens": snapshot.header.live.position})
