"""What the model's thread does: it picks the next unit of work and runs it. Asks come first, reading fills the rest.

Knows no thread and no lock: whoever calls `turn` owns the model.
"""

import logging
import math

from iotd.engine.answer import Answer, Kit
from iotd.engine.asks import Asks
from iotd.engine.call import Call
from iotd.engine.reader import Reader
from iotd.engine.saver import Saver
from iotd.errors import Internal, IotdError
from iotd.events import Done, Failed, FinishReason

log = logging.getLogger(__name__)

READING_SHARE = 0.25
"""Asks owe reading this much of the time they take: with asks without end, reading gets a fifth of all time. An ask
that waits is put off for a quarter of what it has left at most, and never made late: asks are accepted so that there is
time for reading between them."""
MOST_OWED_S = 1.0
"""Owed more than this, reading goes before asks that are yet to come: a flood of urgent ones cannot stop it."""


class Worker:
    """Runs one ask at a time, in units.

    Between two asks comes some reading, in whole units, so that a flood of asks cannot make the context stale.
    """

    def __init__(self, asks: Asks, reader: Reader, saver: Saver, kit: Kit) -> None:
        self._asks = asks
        self._reader = reader
        self._saver = saver
        self._kit = kit
        self._running: tuple[Call, Answer] | None = None
        self._preempted: dict[Call, Answer] = {}
        """Answers that have made way for others."""
        self._owed_s = 0.0
        """What asks owe reading; below zero after a unit that took longer."""
        self._read_s = 0.0
        """What reading took since the last ask."""

    def turn(self) -> bool:
        """Run one unit of work. False where there was nothing to do."""
        self._asks.settle(self._kit.clock())
        self._announce_reading()
        self._preempt()
        if self._running is None and not self._reading_is_due():
            self._take()
        if self._running is not None:
            self._answer(*self._running)
            return True
        self._saver.turn()
        if self._reader.idle:
            self._owed_s = 0.0
            return False
        self._read()
        return True

    def _reading_is_due(self) -> bool:
        if self._owed_s <= 0 or self._reader.idle:
            return False
        now_s = self._kit.clock()
        put_off_s = READING_SHARE * (self._asks.next_deadline_s(math.inf) - now_s)
        return now_s + self._reader.unit_s <= self._asks.latest_start_s and self._read_s < put_off_s

    def _announce_reading(self) -> None:
        """For the asks that are planned meanwhile."""
        self._asks.reading_share = 0.0 if self._reader.idle else READING_SHARE
        self._asks.debt_s = 0.0 if self._reader.idle else max(0.0, self._owed_s - MOST_OWED_S)

    def _read(self) -> None:
        self._kit.costs.rest()
        began_s = self._kit.clock()
        self._reader.advance()
        took_s = self._kit.clock() - began_s
        self._read_s += took_s
        self._owed_s = max(self._owed_s - took_s, -took_s)

    def _take(self) -> None:
        call = self._asks.take(self._kit.clock())
        if call is not None:
            self._kit.costs.begin()
            self._running = call, self._preempted.pop(call, None) or Answer(call, self._kit)

    def _preempt(self) -> None:
        """Put the running answer back where another needs the model, and drop those that ended meanwhile."""
        if self._running is not None:
            call, answer = self._running
            if self._asks.must_be_preempted(call, answer.unit_s, self._kit.clock()):
                answer.preempt()
                self._asks.preempt(call, self._kit.clock())
                self._preempted[call] = answer
                self._running = None
        for call in [call for call in self._preempted if call.ended]:
            self._preempted.pop(call).close()
            self._asks.release(call)

    def _answer(self, call: Call, answer: Answer) -> None:
        """Advance the running ask by one unit, and let it go where that ended it or something else had."""
        event = None if call.ended else self._advance(call, answer)
        if event is not None:
            self._asks.end(call, event)
        if call.ended:
            answer.close()
            self._asks.release(call)
            self._running = None
            meter = call.meter
            took_s = meter.image_s + meter.prefill_s + meter.decode_s
            self._read_s = 0.0
            self._owed_s = min(self._owed_s, 2 * MOST_OWED_S) + READING_SHARE * took_s

    def _advance(self, call: Call, answer: Answer) -> Done | Failed | None:
        try:
            reason = answer.advance()
        except IotdError as error:
            return Failed(error)
        except Exception:
            log.exception("answering %s failed", call.request_id)
            self._kit.counters.add("defects")
            return Failed(Internal("internal error, see the log"))
        if reason is None:
            return None
        now_s = self._kit.clock()
        return call.overdue(now_s) if reason is FinishReason.BUDGET else call.done(reason, now_s)
