"""One answer's way from the engine's thread to the coroutine of its RPC. Bounded, and never blocks the engine."""

import asyncio
import threading
from collections import deque
from contextlib import suppress

from iotd.events import Accepted, AnswerEvent, Delta, Done, Failed

MAX_PIECE_CHARS = 65_536
"""Text that has gathered leaves in pieces of about this size: gRPC clients take messages of 4 MiB by default."""


class Mailbox:
    """Holds no more than one answer's text and its end, however far the reader is behind.

    Made on the reader's event loop.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._filled = asyncio.Event()
        self._lock = threading.Lock()
        self._deltas: deque[Delta] = deque()
        self._end: Done | Failed | None = None
        self._closed = False

    def put(self, event: AnswerEvent) -> None:
        """From any thread. The first end counts; what comes after it, or after `close`, is dropped."""
        with self._lock:
            if self._closed or self._end is not None or isinstance(event, Accepted):
                return
            if isinstance(event, Delta):
                if event.text:
                    self._deltas.append(event)
            else:
                self._end = event
            # A loop that ended before its calls did has no reader any more: nothing the engine should hear of.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._filled.set)

    async def get(self) -> Delta | Done | Failed:
        """The text that has gathered, thoughts and answer apart, else the end."""
        while True:
            await self._filled.wait()
            with self._lock:
                if self._deltas:
                    return self._gathered()
                if self._end is not None:
                    return self._end
                self._filled.clear()

    def close(self) -> None:
        """The reader is gone."""
        with self._lock:
            self._closed = True
            self._deltas.clear()

    def _gathered(self) -> Delta:
        text, thought = "", self._deltas[0].thought
        while self._deltas and self._deltas[0].thought is thought and len(text) < MAX_PIECE_CHARS:
            text += self._deltas.popleft().text
        return Delta(text, thought)
