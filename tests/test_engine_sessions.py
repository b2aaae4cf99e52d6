"""A session goes on exactly from where its answer ended, is bounded in memory, and is never silently begun anew."""

from typing import Any

import pytest
from engine_driver import DrivenEngine, Sink, reading
from fake_model import CONTROLS, FakeModel, FakeState
from hypothesis import given, settings
from hypothesis import strategies as st

from iotd.engine.answer import Answer
from iotd.errors import DeadlineExceeded, InvalidInput, NotFound
from iotd.events import Done, Failed, FinishReason

SLOT = (256 + 64 + 256) * 8
"""Bytes of a stand-in's state."""
CLOSE, USER = (256 + CONTROLS.index(name) for name in ("<close>", "<user>"))


def engine_with(sessions: int = 2, **changes: Any) -> DrivenEngine:
    return DrivenEngine(FakeModel(eos_every=changes.pop("eos_every", 0)), session_bytes=sessions * SLOT, **changes)


def ended(engine: DrivenEngine, question: str, **changes: Any) -> tuple[str, Done]:
    sink, _ = engine.ask(question, **changes)
    engine.settle()
    assert isinstance(sink.end, Done), sink.end
    return sink.text, sink.end


def greedy(model: FakeModel, trace: list[Any], n_tokens: int) -> str:
    """What the model says after `trace`, read from scratch."""
    state = FakeState(10_000)
    state.trace = list(trace)
    text = ""
    for _ in range(n_tokens):
        token = int(model.logits(state).argmax())
        if token == model_end(model):
            break
        text += chr(token)
        state.trace.append(token)
    return text


def model_end(model: FakeModel) -> int:
    return 256 + len(CONTROLS)


def turn(question: str) -> list[int]:
    return [*question.encode(), CLOSE]


@pytest.mark.parametrize("eos_every", [0, 3], ids=["cut by its length", "ended by the model"])
def test_a_follow_up_is_what_the_whole_conversation_gives(eos_every: int) -> None:
    engine = engine_with(eos_every=eos_every)
    engine.observe(reading(0))
    engine.settle()
    first, done = ended(engine, "one?", keep_session=True)
    trace = [*engine.live.trace, *turn("one?"), *first.encode()]
    for question in ("two?", "three?"):
        text, done = ended(engine, question, session=done.session)
        trace += [USER, *turn(question)]
        assert text == greedy(engine.model, trace, 4)
        trace += text.encode()
    assert done.session


def test_a_follow_up_reads_its_question_alone_however_much_has_come_since() -> None:
    engine = engine_with()
    for n in range(5):
        engine.observe(reading(n))
    engine.settle()
    _, first = ended(engine, "one?", keep_session=True)
    for n in range(5, 100):
        engine.observe(reading(n))
        engine.settle()
    _, second = ended(engine, "two?", session=first.session)
    assert second.usage.prompt_tokens == len("two?") + 3  # the last token, the new turn, its close
    assert second.usage.context_tokens == first.usage.context_tokens + first.usage.prompt_tokens + 3


def test_catching_up_reads_what_has_come_since_and_nothing_twice() -> None:
    engine = engine_with()
    engine.observe(reading(0))
    engine.settle()
    _, done = ended(engine, "one?", keep_session=True)
    engine.observe(reading(1))
    engine.observe(reading(2))
    engine.settle()
    ended(engine, "two?", session=done.session, catch_up=True)
    seen = engine.fork.text
    assert [seen.count(f"on{n}\n") for n in range(3)] == [1, 1, 1]
    assert seen.index("on2\n") < seen.index("two?")
    engine.observe(reading(3))
    engine.settle()
    ended(engine, "three?", session=done.session, catch_up=True)
    assert [engine.fork.text.count(f"on{n}\n") for n in range(4)] == [1, 1, 1, 1]


def test_catching_up_takes_the_newest_that_fit() -> None:
    engine = engine_with()
    _, done = ended(engine, "one?", keep_session=True)
    for n in range(200):
        engine.observe(reading(n))
        engine.settle()
    _, second = ended(engine, "two?", session=done.session, catch_up=True)
    assert "on199\n" in engine.fork.text
    assert "on0\n" not in engine.fork.text
    assert second.usage.prompt_tokens <= engine.fork.capacity // 2 + 20


def test_the_session_unused_for_longest_makes_way_and_is_not_begun_anew() -> None:
    engine = engine_with(sessions=2)
    names = [ended(engine, f"{n}?", keep_session=True)[1].session for n in range(2)]
    ended(engine, "again?", session=names[0])
    names.append(ended(engine, "third?", keep_session=True)[1].session)
    assert len({*names}) == 3
    with pytest.raises(NotFound, match="keep_session"):
        engine.ask("?", session=names[1])
    for name in (names[0], names[2]):
        ended(engine, "still there?", session=name)
    status = engine.status()
    assert (status.sessions, status.counters["sessions_dropped"]) == (2, 1)


def test_sessions_take_no_more_than_they_may_and_nothing_before_they_are_needed() -> None:
    engine = engine_with(sessions=2)
    before = engine.status().state_nbytes
    ended(engine, "one?")
    assert engine.status().state_nbytes == before
    for n in range(20):
        ended(engine, f"{n}?", keep_session=True)
    assert engine.status().state_nbytes == before + 2 * SLOT


def test_without_room_for_one_a_session_is_refused_at_once() -> None:
    engine = DrivenEngine(session_bytes=SLOT - 1)
    with pytest.raises(InvalidInput, match=r"ask\.session_bytes") as caught:
        engine.ask("one?", keep_session=True)
    assert caught.value.field == "keep_session"


@pytest.mark.parametrize("how", ["cancelled", "late", "defect"])
def test_a_follow_up_that_comes_to_nothing_leaves_the_session_as_it_was(how: str) -> None:
    engine = engine_with()
    _, done = ended(engine, "one?", keep_session=True)
    expected, _ = ended(engine_with(), "one?", keep_session=True)
    sink, ticket = engine.ask("lost?", session=done.session, budget_s=5.0)
    engine.turn()
    engine.turn()
    if how == "cancelled":
        ticket.cancel()
    elif how == "late":
        engine.clock.now_s += 10
    else:
        engine.model.on_run = broken
    engine.settle()
    engine.model.on_run = FakeModel.silent
    assert isinstance(sink.end, Failed) or sink.end.finish_reason is not FinishReason.STOP  # type: ignore[union-attr]
    assert not isinstance(sink.end, Done) or not sink.end.session
    assert expected
    text, _ = ended(engine, "two?", session=done.session)
    plain = engine_with()
    _, other = ended(plain, "one?", keep_session=True)
    assert text == ended(plain, "two?", session=other.session)[0]


def broken(what: str, n_tokens: int) -> None:
    raise RuntimeError("a defect")


def test_an_ask_that_failed_keeps_no_session() -> None:
    engine = engine_with()
    sink, _ = engine.ask("late?", keep_session=True, budget_s=1.0)
    engine.clock.now_s += 2
    engine.settle()
    assert isinstance(sink.end, Failed)
    assert isinstance(sink.end.error, DeadlineExceeded)
    assert engine.status().sessions == 0


@pytest.mark.parametrize("named", [False, True], ids=["before it is named", "once it is named"])
def test_a_session_is_kept_where_its_name_was_told_whichever_thread_ended_the_answer(
    named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_with()
    sink, _ = engine.ask("one?", keep_session=True, budget_s=5.0)
    engine.turns_until(lambda: len(sink) == 3)
    naming = Answer._name_session

    def deadline_comes(answer: Answer, reason: FinishReason) -> None:
        if named:
            naming(answer, reason)
        engine._asks.settle(engine.clock() + 10)
        if not named:
            naming(answer, reason)

    monkeypatch.setattr(Answer, "_name_session", deadline_comes)
    engine.settle()
    monkeypatch.undo()
    assert isinstance(sink.end, Done)
    assert bool(sink.end.session) == named
    assert engine.status().sessions == named
    if named:
        text, _ = ended(engine, "two?", session=sink.end.session)
        said = sink.text.removesuffix("…").encode()
        trace = [*engine.live.trace, *turn("one?"), *said, USER, *turn("two?")]
        assert text == greedy(engine.model, trace, 4)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("reading"), st.integers(0, 40)),
        st.tuples(st.just("keep"), st.integers(0, 3)),
        st.tuples(st.just("follow"), st.integers(0, 5)),
        st.tuples(st.just("ask"), st.integers(0, 3)),
    ),
    max_size=40,
)


@settings(max_examples=60)
@given(STEPS)
def test_whatever_comes_between_a_session_says_what_its_own_conversation_gives(steps: list[tuple[str, int]]) -> None:
    engine = engine_with(sessions=2)
    known: dict[str, list[Any]] = {}
    for n, (step, value) in enumerate(steps):
        if step == "reading":
            engine.observe(reading(n, "x" * value))
            engine.settle()
            continue
        sink: Sink
        name = list(known)[value % len(known)] if step == "follow" and known else None
        try:
            sink, _ = engine.ask(f"{n}?", session=name, keep_session=step == "keep")
        except NotFound:
            assert name is not None
            del known[name]
            continue
        trace = [*known[name], USER] if name else list(engine.live.trace)
        engine.settle()
        assert isinstance(sink.end, Done)
        trace += turn(f"{n}?")
        assert sink.text == greedy(engine.model, trace, 4)
        if sink.end.session:
            known[sink.end.session] = [*trace, *sink.text.encode()]
