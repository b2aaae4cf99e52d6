"""The warm context: one open user's turn that holds the newest history, between half a window and a window of it.

It owns two states, a third that has read the system prompt alone, and the few events it may need again, and is worked
one unit at a time. It knows no clock, no queue and no ask. Whatever `live` holds is whole: an event that takes more
than one chunk is read by the spare state, in rows lent by `live`, which then goes on from there; so a fork never begins
in the middle of a line. Where an ask needs the rows meanwhile, the event is read once more, into the spare state's own.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from iotd.counters import Counters
from iotd.engine.costs import Costs
from iotd.engine.entry import Chunk, Entry, Part, Rows, Tokens, chunks, count_tokens
from iotd.engine.feed import encode, feed
from iotd.engine.lines import Lines
from iotd.engine.snapshot import (
    FORMAT,
    Arrays,
    Header,
    Key,
    Snapshot,
    pack_entries,
    pack_state,
    unpack_entries,
    unpack_state,
)
from iotd.errors import ConfigError, SnapshotError, StateMismatch
from iotd.model import Model
from iotd.model.state import State

log = logging.getLogger(__name__)

SLACK_TOKENS = 64
"""A successor may exceed the window by a date line, where system prompt and events are as long as they may be."""


def positions(window: int, reserve_tokens: int) -> int:
    """Of a context's state, with what is kept for a question, its images and its answer."""
    return window + SLACK_TOKENS + reserve_tokens


@dataclass(frozen=True, slots=True)
class View:
    """What the context holds, for any thread to look at."""

    n_tokens: int = 0
    oldest_s: float = 0.0
    """Unix time of the oldest event in it; 0 where it holds none."""
    newest_s: float = 0.0


@dataclass(slots=True)
class _Job:
    """Chunks on their way into a state, and what the context will be once all are read."""

    target: State
    plan: Callable[[], Iterator[Chunk]]
    """All that is to be read, from the beginning."""
    new: list[Entry]
    """Events read for the first time."""
    oldest_s: float
    day: str
    rebuilds: bool = False
    chunks: Iterator[Chunk] = field(init=False)
    """Those behind the next one."""
    chunk: Chunk | None = field(init=False)
    """The next one; None where all are read."""

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.chunks = self.plan()
        self.advance()

    def advance(self) -> None:
        self.chunk = next(self.chunks, None)


class Context:
    """Reads entries into `live`, and builds its successor when the window is full."""

    def __init__(
        self,
        model: Model,
        lines: Lines,
        *,
        system: str,
        window: int,
        reserve_tokens: int,
        costs: Costs,
        chunk_tokens: int,
        chunk_s: float,
        counters: Counters,
    ) -> None:
        """reserve_tokens: positions past the window, lent to a fork for its question and answer.

        chunk_tokens, chunk_s: what is read at once takes no more of either, and a token at least.
        """
        self._model = model
        self._lines = lines
        self._window = window
        self._key = Key(model.fingerprint, window, system)
        self._costs = costs
        self._chunk_tokens = chunk_tokens
        self._chunk_s = chunk_s
        self._counters = counters
        self._opening: Tokens = lines.opening(system)
        n_opening = len(self._opening)
        if n_opening > window // 4:
            raise ConfigError(
                f"the system prompt takes {n_opening} tokens, more than a quarter of the window of {window}",
                field="context.system",
            )
        self.blank = model.new_state(n_opening + reserve_tokens)
        """Has read the system prompt, once and for all."""
        self.live = model.new_state(positions(window, reserve_tokens))
        self._spare = model.new_state(positions(window, reserve_tokens))
        self._history: deque[Entry] = deque()
        self._history_tokens = 0
        self._day = ""
        self._job: _Job | None = None
        self.n_read = 0
        """Events read since the start."""
        self.frozen = False
        """The spare state holds a copy that is being saved: nothing can be read until `thaw`."""
        self.view = View()

    @property
    def busy(self) -> bool:
        """A job is under way; nothing can be appended before it has ended."""
        return self._job is not None

    @property
    def unit_s(self) -> float:
        """What the next unit of work takes, by what is known of it."""
        chunk = self._job.chunk if self._job is not None else None
        if isinstance(chunk, Rows) and chunk.image.embedding is None:
            return self._costs.image_s(chunk.image.n_tokens)
        n_tokens = count_tokens([chunk]) if chunk is not None else self._size()
        return self._costs.read_s(n_tokens, self.live.position)

    @property
    def nbytes(self) -> int:
        return self.blank.nbytes + self.live.nbytes + self._spare.nbytes

    def open(self) -> None:
        """Read the system prompt."""
        for chunk in chunks([self._opening], lambda: self._chunk_tokens):
            with self._costs.read(count_tokens([chunk]), self.blank.position):
                feed(self._model, self.blank, chunk)
        self.blank.copy_into(self.live)
        self.view = View(self.live.position)

    def capture(self) -> Snapshot:
        """What `live` holds, as views of it: to be used up before anything more is read."""
        return self._captured(self.live)

    def freeze(self) -> Snapshot:
        """The same, as views of a copy in the spare state, which is kept for it until `thaw`. Not while busy."""
        assert not self.busy
        self.live.copy_into(self._spare)
        self.frozen = True
        return self._captured(self._spare)

    def thaw(self) -> None:
        self.frozen = False

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot, in place of `open`. Raises SnapshotError, and has read nothing then."""
        header = snapshot.header
        if (reason := self._foreign(header)) is not None:
            raise SnapshotError(reason)
        entries = unpack_entries(header.entries, snapshot.arrays)
        try:
            unpack_state("blank", header.blank, snapshot.arrays, self.blank)
            unpack_state("live", header.live, snapshot.arrays, self.live)
        except StateMismatch as error:
            self.blank.reset()
            self.live.reset()
            raise SnapshotError(f"the snapshot does not hold what it says: {error}") from error
        self._day = header.day
        self._remember(entries)
        self._look(header.oldest_s)

    def append(self, entries: list[Entry]) -> bool:
        """Plan to read new events; `advance` does it. True where a state was copied for it. Not while busy."""
        assert self._job is None
        parts, day = self._dated(entries, self._day)
        n_tokens = count_tokens(parts)
        if self.live.position + n_tokens > self._window:
            self._rebuild(entries)
            return True
        target = self.live
        if n_tokens > self._size() or any(entry.has_image for entry in entries):
            target = self._spare
            self.live.lend_to(target)
        oldest_s = self.view.oldest_s or entries[0].time_s
        self._job = _Job(target, self._plan(parts), entries, oldest_s, day)
        return target is not self.live

    def advance(self) -> None:
        """Read one chunk, or encode one image, of the job under way. Raises what the model raises."""
        job = self._job
        assert job is not None
        if job.target.dispossessed:  # an ask took the rows: a second one shall not
            self.live.copy_into(job.target)
            job.begin()
            return
        chunk = job.chunk
        if chunk is None:  # a successor without events
            self._commit(job)
            return
        if isinstance(chunk, Rows) and chunk.image.embedding is None:
            with self._costs.image(chunk.image.n_tokens):
                encode(self._model, chunk.image)
            self._counters.add("images_encoded")
            return
        n_tokens = count_tokens([chunk])
        with self._costs.read(n_tokens, job.target.position):
            feed(self._model, job.target, chunk)
        self._counters.add("context_tokens_read", n_tokens)
        job.advance()
        if job.chunk is None:
            self._commit(job)

    def abandon(self) -> int:
        """Give up a job that failed, and mend the context. Returns how many events are lost by it."""
        job, self._job = self._job, None
        assert job is not None
        lost = len(job.new)
        if job.rebuilds and not lost:
            lost = len(self._history)
            if lost == 0:
                return 0
            self._history.clear()
            self._history_tokens = 0
        if job.rebuilds or job.target is self.live:
            self._rebuild([])
        return lost

    def _rebuild(self, new: list[Entry]) -> None:
        """Plan a successor from the newest events: half a window of them at least, `new` included."""
        kept: deque[Entry] = deque()
        for entry, n_tokens in self._newest_first([*self._history, *new]):
            kept.appendleft(entry)
            if n_tokens >= self._window // 2:
                break
        parts, last_day = self._dated(kept, "")
        self.blank.copy_into(self._spare)
        oldest_s = kept[0].time_s if kept else 0.0
        self._job = _Job(self._spare, self._plan(parts), new, oldest_s, last_day, rebuilds=True)

    def _plan(self, parts: list[Part]) -> Callable[[], Iterator[Chunk]]:
        return lambda: chunks(parts, self._size)

    def _size(self) -> int:
        """Tokens that can be read at once."""
        return self._costs.tokens_within(self._chunk_s, self.live.position, self._chunk_tokens)

    def _dated(self, entries: Iterable[Entry], day: str) -> tuple[list[Part], str]:
        """The entries' parts with a date line wherever the day changes, and the day at the end."""
        parts: list[Part] = []
        for entry in entries:
            if entry.day != day:
                day = entry.day
                parts.append(self._lines.date(day))
            parts.extend(entry.parts)
        return parts, day

    def _commit(self, job: _Job) -> None:
        if job.target.works_in_rows_of(self.live):
            if job.target is not self.live:
                self.live.take_over(job.target)
        else:
            self.live, self._spare = self._spare, self.live
            self._spare.reset()  # it takes no memory until it is written again
        if job.rebuilds and job.oldest_s:
            self._counters.add("context_swaps")
        self._job = None
        self._day = job.day
        self._remember(job.new)
        self._look(job.oldest_s)

    def _look(self, oldest_s: float) -> None:
        newest_s = self._history[-1].time_s if self._history else 0.0
        self.view = View(self.live.position, oldest_s, newest_s)

    def _captured(self, state: State) -> Snapshot:
        arrays: Arrays = {}
        header = Header(
            format=FORMAT,
            key=self._key,
            blank=pack_state("blank", self.blank, arrays),
            live=pack_state("live", state, arrays),
            oldest_s=self.view.oldest_s,
            day=self._day,
            entries=pack_entries(self._history, arrays),
        )
        return Snapshot(header, arrays)

    def _foreign(self, header: Header) -> str | None:
        """Why a snapshot cannot be restored here, or None."""
        if header.format != FORMAT:
            return f"it has format {header.format}, and this version reads {FORMAT}"
        for name, what in (("model", "model package"), ("window", "context.window"), ("system", "context.system")):
            if getattr(header.key, name) != getattr(self._key, name):
                return f"it was made with another {what}"
        return None

    def said(self) -> Iterator[int]:
        """Tokens of the events that are remembered, in their order, without those of images."""
        for entry in self._history:
            for part in entry.parts:
                if isinstance(part, list):
                    yield from part

    def since(self, n_read: int, max_tokens: int) -> list[Part]:
        """What was read after the first `n_read` events, with its dates: the newest that fit into `max_tokens`."""
        kept: deque[Entry] = deque()
        new = list(self._history)[-(self.n_read - n_read) :] if self.n_read > n_read else []
        for entry, n_tokens in self._newest_first(new):
            if n_tokens > max_tokens:
                break
            kept.appendleft(entry)
        return self._dated(kept, "")[0]

    def _newest_first(self, entries: Sequence[Entry]) -> Iterator[tuple[Entry, int]]:
        """Each entry with the tokens that it and all newer ones take, their date lines included."""
        n_tokens, day = 0, ""
        for entry in reversed(entries):
            n_tokens += entry.n_tokens
            if entry.day != day:
                day = entry.day
                n_tokens += len(self._lines.date(day))
            yield entry, n_tokens

    def _remember(self, new: list[Entry]) -> None:
        """Keep what the next successor may be built from, and no more."""
        self.n_read += len(new)
        for entry in new:
            self._history.append(entry)
            self._history_tokens += entry.n_tokens
        while self._history and self._history_tokens - self._history[0].n_tokens >= self._window // 2:
            self._history_tokens -= self._history.popleft().n_tokens
