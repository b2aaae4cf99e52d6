"""Background reading: from the backlog into the context, one unit of work at a time. Knows no ask and no clock."""

import logging

from iotd.counters import Counters
from iotd.engine.backlog import Backlog, Shot
from iotd.engine.context import Context
from iotd.engine.entry import Entry, joined
from iotd.engine.lines import Lines
from iotd.errors import IotdError
from iotd.events import Reading

log = logging.getLogger(__name__)

TELL_SKIPPED_S = 60.0
"""Of the stream's time: under a flood, one line a minute says how much was left out."""


class Reader:
    """Takes events in their order, renders them, and has the context read them.

    Short lines that wait together are read together, in one chunk: a run of 32 tokens costs little more than one of 16.
    """

    def __init__(self, backlog: Backlog, lines: Lines, context: Context, chunk_tokens: int, counters: Counters) -> None:
        self._backlog = backlog
        self._lines = lines
        self._context = context
        self._chunk_tokens = chunk_tokens
        self._counters = counters
        self._next: Entry | None = None
        self._n_skipped = 0
        self._told_skipped_s = 0.0
        self._n_refused = 0

    @property
    def idle(self) -> bool:
        """Everything that arrived has been read, or nothing can be read now."""
        return self._context.frozen or not (self._context.busy or self._next or len(self._backlog))

    @property
    def unit_s(self) -> float:
        """What the next unit of work takes."""
        return self._context.unit_s

    def advance(self) -> None:
        """Run one unit of work, if there is any. A defect costs the events it met, and nothing else."""
        try:
            if not self._context.busy:
                entries = self._gather()
                if not entries:
                    return
                if self._context.append(entries):
                    return  # a copy of the state was enough for one unit
            self._context.advance()
        except Exception:
            log.exception("reading into the context failed")
            self._lose(self._context.abandon() if self._context.busy else 1)

    def _gather(self) -> list[Entry]:
        """What to read next: a frame, a long line, or lines that together fill a chunk. Empty where nothing waits."""
        entries: list[Entry] = []
        room = self._chunk_tokens
        while room > 0 and (entry := self._take()) is not None:
            if entries and (entry.n_tokens > room or entry.has_image):
                self._next = entry
                break
            entries.append(entry)
            room -= entry.n_tokens
        return entries

    def _take(self) -> Entry | None:
        """The next event that can be read, or None where none waits."""
        entry, self._next = self._next, None
        while entry is None and (event := self._backlog.take()) is not None:
            try:
                entry = self._reading(event) if isinstance(event, Reading) else self._frame(event)
            except Exception:
                log.exception("an event could not be rendered")
                self._lose(1)
        return entry

    def _reading(self, reading: Reading) -> Entry:
        entry, cut = self._lines.reading(reading)
        self._counters.add("readings_read")
        if cut:
            self._counters.add("cut_readings")
        self._n_skipped += self._backlog.take_skipped()
        if not self._n_skipped or abs(reading.time_s - self._told_skipped_s) < TELL_SKIPPED_S:
            return entry
        note = self._lines.skipped(self._n_skipped, reading.time_s)
        self._n_skipped, self._told_skipped_s = 0, reading.time_s
        return joined(note, entry)

    def _frame(self, shot: Shot) -> Entry | None:
        try:
            entry = self._lines.frame(shot)
        except IotdError as error:
            self._backlog.refuse(shot.camera)
            self._n_refused += 1
            if self._n_refused.bit_count() == 1:  # the 1st, 2nd, 4th, 8th…: a camera sends the same for days
                log.warning("a frame of camera %s is not read (%d so far): %s", shot.camera, self._n_refused, error)
            return None
        self._counters.add("frames_read")
        return entry

    def _lose(self, n: int) -> None:
        self._counters.add("defects")
        self._counters.add("lost_events", n)
