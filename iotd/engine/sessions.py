"""Conversations that can be gone on with: the state behind each answer that was kept, the least recently used dropped.

Knows no queue and no clock. A session is read and written by the model's thread; any thread may ask for its name.
"""

import logging
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from iotd.counters import Counters
from iotd.engine.snapshot import Arrays, SessionHeader, pack_state, unpack_state
from iotd.errors import InvalidInput, NotFound, StateMismatch
from iotd.model.state import State

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Session:
    """Where a conversation stands."""

    state: State
    unread: list[int] = field(default_factory=list)
    """Tokens of the last answer that its state has not read yet."""
    n_read: int = 0
    """Events that the context had read when it was last seen."""


class Sessions:
    """As many as fit into `max_nbytes`, each with a state of its own, allocated when it is first needed."""

    def __init__(self, new_state: Callable[[], State], nbytes_each: int, max_nbytes: int, counters: Counters) -> None:
        self._new_state = new_state
        self._nbytes_each = nbytes_each
        self._most = max_nbytes // nbytes_each
        self._max_nbytes = max_nbytes
        self._counters = counters
        self._lock = threading.Lock()
        self._open: OrderedDict[str, Session] = OrderedDict()
        self._free: list[State] = []

    def __len__(self) -> int:
        return len(self._open)

    @property
    def nbytes(self) -> int:
        """Of the states allocated so far."""
        with self._lock:
            return self._nbytes_each * (len(self._open) + len(self._free))

    def check(self, name: str | None, keep: bool) -> None:
        """What can be told of a request before its turn. Raises NotFound or InvalidInput."""
        if name is not None and name not in self._open:
            raise _unknown(name)
        if keep and name is None and not self._most:
            text = f"a session takes {self._nbytes_each} bytes and ask.session_bytes is {self._max_nbytes}"
            raise InvalidInput(text, field="keep_session")

    def get(self, name: str) -> Session:
        """The session, which is then the last to be dropped. Raises NotFound."""
        with self._lock:
            found = self._open.get(name)
            if found is None:
                raise _unknown(name)
            self._open.move_to_end(name)
            return found

    def open(self) -> str:
        """Make room for a new session and give its name; the one unused for longest makes way where there is none."""
        with self._lock:
            if self._free:
                state = self._free.pop()
            elif len(self._open) < self._most:
                state = self._new_state()
            else:
                _, dropped = self._open.popitem(last=False)
                state = dropped.state
                self._counters.add("sessions_dropped")
            name = secrets.token_hex(8)
            self._open[name] = Session(state)
            self._counters.add("sessions_opened")
            return name

    def pack(self, n_read: int, arrays: Arrays) -> list[SessionHeader]:
        """Describe all sessions, and add their states' arrays; n_read: events that the context has read."""
        return [
            SessionHeader(name, pack_state(name, session.state, arrays), session.unread, n_read - session.n_read)
            for name, session in self._open.items()
        ]

    def unpack(self, headers: list[SessionHeader], n_read: int, arrays: Mapping[str, NDArray[np.float32]]) -> None:
        """Go on with those of a snapshot, the newest that there is room for. A damaged one is left out."""
        for header in headers[-self._most :] if self._most else []:
            state = self._free.pop() if self._free else self._new_state()
            try:
                unpack_state(header.name, header.state, arrays, state)
            except StateMismatch as error:
                log.warning("the session %s is not restored: %s", header.name, error)
                self._free.append(state)
                continue
            self._open[header.name] = Session(state, header.unread, n_read - header.behind)

    def drop(self, name: str) -> None:
        """Forget a session whose state was not kept after all."""
        with self._lock:
            found = self._open.pop(name, None)
            if found is not None:
                self._free.append(found.state)


def _unknown(name: str) -> NotFound:
    return NotFound(
        f"no session {name!r}: newer ones took its place, or the daemon was restarted; ask with keep_session to begin "
        "a new one"
    )
