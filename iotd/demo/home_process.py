"""The simulated home in a process of its own, which also draws the questions about it.

Whoever measures times in this process is then not held up by pictures that are drawn and answers that are worked out.
"""

import multiprocessing
import random
import signal
import threading
from collections.abc import Collection
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

from iotd.demo import simulate
from iotd.demo.ledger import Ledger
from iotd.demo.questions import Question
from iotd.errors import IotdError, Unavailable

STOP_S = 10.0
DRAWS = 6
"""Tries for a question whose answer is settled."""


class HomeProcess:
    """Publishes to a broker inside a `with` block."""

    def __init__(self, host: str, port: int, *, seed: int, rate_hz: float, frame_hz: float, speed: float) -> None:
        """Of the rest see `simulate.run`. frame_hz: 0 for a home without a camera."""
        spawn = multiprocessing.get_context("spawn")  # a fork would take gRPC's threads for its own
        self._connection, theirs = spawn.Pipe()
        self._asking = threading.Lock()
        args = (theirs, host, port, seed, rate_hz, frame_hz, speed)
        self._process = spawn.Process(target=_live, args=args, name="simulated-home", daemon=True)
        self._theirs = theirs

    def question(self, seed: int, kinds: Collection[str], forms: Collection[str]) -> Question | None:
        """One that the home draws: see `Ledger.question`. Raises IotdError where the home has ended."""
        try:
            with self._asking:
                self._connection.send((seed, kinds, forms))
                drawn: Question | IotdError | None = self._connection.recv()
        except (OSError, EOFError) as error:
            raise Unavailable("the simulated home has ended") from error
        if isinstance(drawn, IotdError):
            raise drawn
        return drawn

    def __enter__(self) -> Self:
        self._process.start()
        self._theirs.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join(STOP_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _live(
    connection: Connection, host: str, port: int, seed: int, rate_hz: float, frame_hz: float, speed: float
) -> None:
    """Until the other end of the connection is closed, or its process has died."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started this
    ledger = Ledger(camera=frame_hz > 0)
    options = {"seed": seed, "rate_hz": rate_hz, "frame_hz": frame_hz, "speed": speed, "lived_in": True}
    with simulate.running(host, port, tell=ledger.tell, **options) as home:
        while True:
            try:
                seed, kinds, forms = connection.recv()
            except EOFError:
                return
            try:
                if home.done():
                    home.result()
                connection.send(_drawn(ledger, random.Random(seed), kinds, forms))
            except IotdError as error:
                connection.send(error)


def _drawn(ledger: Ledger, rng: random.Random, kinds: Collection[str], forms: Collection[str]) -> Question | None:
    return next(filter(None, (ledger.question(rng, kinds, forms) for _ in range(DRAWS))), None)
