"""One ask's events: deltas, then exactly one end, whichever thread gets there first."""

import threading

from engine_driver import Sink

from iotd.engine.call import Call
from iotd.engine.plan import Work
from iotd.errors import DeadlineExceeded
from iotd.events import Ask, Delta, Done, Failed, FinishReason


def make_call(sink: Sink) -> Call:
    return Call(Ask("how?", arrived_s=10.0, deadline_s=12.0), Work("text", 0, (4,), 16), sink, "id")


def test_a_call_ends_once_and_says_nothing_after_it() -> None:
    sink = Sink()
    call = make_call(sink)
    call.speak("a", 11.0)
    done = call.done(FinishReason.STOP, 11.5)
    assert call.end(done)
    assert not call.end(Failed(DeadlineExceeded("late")))
    call.speak("b", 11.6)
    assert sink == [Delta("a"), done]


def test_an_answer_that_its_deadline_cuts_is_made_whole() -> None:
    sink = Sink()
    call = make_call(sink)
    call.speak('{"a', 11.0, ending='": 0}')
    done = call.overdue(12.0)
    assert call.end(done)
    assert sink == [Delta('{"a'), Delta('": 0}'), done]


def test_an_answer_that_is_cancelled_is_not_made_whole() -> None:
    sink = Sink()
    call = make_call(sink)
    call.speak('{"a', 11.0, ending='": 0}')
    done = call.done(FinishReason.CANCELLED, 11.5)
    assert call.end(done)
    assert sink == [Delta('{"a'), done]


def test_an_empty_piece_is_not_a_word() -> None:
    sink = Sink()
    call = make_call(sink)
    call.speak("", 11.0)
    assert not call.spoke
    assert sink == []


def test_a_thought_is_not_a_word() -> None:
    sink = Sink()
    call = make_call(sink)
    call.speak("Hm.", 11.0, thought=True)
    assert sink == [Delta("Hm.", thought=True)]
    assert isinstance(call.overdue(12.0), Failed)
    assert call.end(Failed(DeadlineExceeded("late")))


def test_an_overdue_call_ends_with_what_it_said_or_with_an_error() -> None:
    silent, spoken = make_call(Sink()), make_call(Sink())
    spoken.speak("a", 11.0)
    failed, done = silent.overdue(12.0), spoken.overdue(12.0)
    assert isinstance(failed, Failed) and isinstance(failed.error, DeadlineExceeded)
    assert isinstance(done, Done) and done.finish_reason is FinishReason.BUDGET
    assert done.timings.first_token_s == 1.0
    assert done.timings.total_s == 2.0


def test_of_two_threads_that_end_a_call_one_does() -> None:
    for _ in range(50):
        sink = Sink()
        call = make_call(sink)
        start = threading.Barrier(3)

        def end(call: Call = call, start: threading.Barrier = start) -> None:
            start.wait()
            call.end(call.overdue(12.0))

        threads = [threading.Thread(target=end) for _ in range(2)]
        for thread in threads:
            thread.start()
        start.wait()
        for thread in threads:
            thread.join()
        assert len(sink) == 1
