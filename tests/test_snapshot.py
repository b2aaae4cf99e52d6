"""A restart goes on where the context was, from a snapshot that is whole and of the same making, or from nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from engine_driver import NOON_S, DrivenEngine, frame, reading
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iotd.engine import Snapshot
from iotd.errors import SnapshotError
from iotd.events import Done, Frame
from iotd.model import Model
from iotd.ops import snapshots

SYSTEM = "You watch a house."


def make_engine(model: Model, **changes: Any) -> DrivenEngine:
    sizes = {"window": 512, "reserve_tokens": 256, "system": SYSTEM}
    return DrivenEngine(model, opened=False, **sizes | changes)  # type: ignore[arg-type] # the real model


def opened(engine: DrivenEngine) -> DrivenEngine:
    if not engine._restored:
        engine._context.open()
    engine._asks.open()
    return engine


def observe(engine: DrivenEngine, first: int, last: int) -> None:
    for n in range(first, last):
        pixels = np.random.default_rng(n).integers(0, 256, (64, 64, 3), np.uint8)
        engine.observe(Frame("door", pixels, NOON_S + n) if n % 7 == 3 else reading(n))
        engine.settle()


@pytest.fixture(scope="module")
def model(tiny_package: Path) -> Model:
    return Model.open(tiny_package, threads=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "context.snapshot"


@pytest.mark.parametrize("n_events", [0, 3, 40])
def test_a_restored_engine_goes_on_as_if_it_had_never_stopped(model: Model, path: Path, n_events: int) -> None:
    """Bit for bit, the answers and the next successor included; 40 events have filled the window more than once."""
    steady = opened(make_engine(model))
    observe(steady, 0, n_events)
    snapshots.save(path, steady._context.capture())
    fresh = make_engine(model)
    fresh.restore(lambda: snapshots.load(path))
    opened(fresh)
    assert fresh._context.view == steady._context.view
    for engine in (steady, fresh):
        observe(engine, n_events, n_events + 30)
    assert fresh._context.view == steady._context.view
    for name, array in steady._context.live.arrays().items():
        np.testing.assert_array_equal(fresh._context.live.arrays()[name], array, err_msg=name)
    assert steady.answer(max_tokens=12) == fresh.answer(max_tokens=12)
    assert steady.answer(use_context=False) == fresh.answer(use_context=False)
    assert fresh.status().counters["snapshots_restored"] == 1


def test_sessions_go_on_after_a_stop(model: Model, path: Path) -> None:
    """And catch up with what the context has read since they were last seen, before the stop and after it."""
    steady = opened(make_engine(model))
    observe(steady, 0, 2)
    sink, _ = steady.ask("one?", keep_session=True)
    steady.settle()
    assert isinstance(sink.end, Done)
    observe(steady, 2, 4)
    snapshots.save(path, steady._snapshot())
    fresh = make_engine(model)
    fresh.restore(lambda: snapshots.load(path))
    opened(fresh)
    assert fresh.status().sessions == 1
    for engine in (steady, fresh):
        observe(engine, 4, 6)
    changes = {"session": sink.end.session, "catch_up": True, "max_tokens": 12}
    assert steady.answer("two?", **changes) == fresh.answer("two?", **changes)
    assert steady.fork.position == fresh.fork.position


def test_a_restore_reads_nothing_again(model: Model, path: Path) -> None:
    engine = opened(make_engine(model))
    observe(engine, 0, 5)
    snapshots.save(path, engine._context.capture())
    fresh = make_engine(model)
    fresh.restore(lambda: snapshots.load(path))
    opened(fresh)
    assert fresh.status().context_tokens == engine.status().context_tokens > 50
    assert fresh.status().counters["context_tokens_read"] == 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"window": 640}, "another context.window"),
        ({"system": "Somebody else."}, "another context.system"),
    ],
)
def test_a_snapshot_of_another_configuration_is_refused(
    model: Model, path: Path, change: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = opened(make_engine(model))
    observe(engine, 0, 5)
    snapshots.save(path, engine._context.capture())
    other = make_engine(model, **change)
    other.restore(lambda: snapshots.load(path))
    assert why in caplog.text
    assert opened(other).status().counters["snapshots_refused"] == 1
    assert other.answer() == opened(make_engine(model, **change)).answer()


def altered(snapshot: Snapshot, **key: Any) -> Snapshot:
    header = snapshot.header
    return replace(snapshot, header=msgspec.structs.replace(header, key=msgspec.structs.replace(header.key, **key)))


def without(snapshot: Snapshot, name: str) -> Snapshot:
    return replace(snapshot, arrays={key: array for key, array in snapshot.arrays.items() if key != name})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s: altered(s, model="0" * 64), "another model package"),
        (lambda s: replace(s, header=msgspec.structs.replace(s.header, format=99)), "format 99"),
        (lambda s: without(s, "live/recurrent.0"), "recurrent.0"),
        (lambda s: without(s, next(name for name in s.arrays if name.startswith("image/"))), "image/"),
        (lambda s: replace(s, header=msgspec.structs.replace(s.header, live=s.header.blank)), "key"),
        (lambda s: replace(s, arrays={k: a.astype(np.float64) for k, a in s.arrays.items()}), "damaged"),
    ],
)
def test_a_snapshot_that_does_not_fit_is_refused_and_leaves_an_empty_context(
    model: Model, change: Callable[[Snapshot], Snapshot], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = opened(make_engine(model))
    observe(engine, 0, 5)
    snapshot = change(engine._context.capture())
    fresh = make_engine(model)
    fresh.restore(lambda: snapshot)
    assert why in caplog.text
    opened(fresh)
    assert fresh.status().context_tokens == opened(make_engine(model)).status().context_tokens
    assert fresh.answer() == opened(make_engine(model)).answer()


@pytest.fixture(scope="module")
def saved(model: Model, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    engine = opened(make_engine(model))
    observe(engine, 0, 5)
    path = tmp_path_factory.mktemp("saved") / "snapshot"
    snapshots.save(path, engine._context.capture())
    return path.read_bytes()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_to_the_file_goes_unnoticed(saved: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """A cut at any place is an error; so is a changed byte, unless it changes nothing that is read."""
    path = tmp_path / "snapshot"
    path.write_bytes(saved)
    whole = snapshots.load(path)
    assert whole is not None
    damaged = bytearray(saved)
    at = data.draw(st.integers(0, len(saved) - 1))
    if data.draw(st.booleans()):
        del damaged[at:]
    else:
        damaged[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    try:
        found = snapshots.load(path)
    except SnapshotError as error:
        assert str(path) in str(error)
        return
    assert len(damaged) == len(saved)
    assert found is not None
    assert found.header == whole.header
    assert found.arrays.keys() == whole.arrays.keys()
    assert all(np.array_equal(found.arrays[name], array) for name, array in whole.arrays.items())


def test_a_save_is_described_and_cleared(model: Model, path: Path) -> None:
    engine = opened(make_engine(model))
    observe(engine, 0, 5)
    assert snapshots.describe(path) is None
    assert not snapshots.clear(path)
    snapshots.save(path, engine._context.capture())
    found = snapshots.describe(path)
    assert found is not None
    status = engine.status()
    assert (found.tokens, found.window, found.events) == (status.context_tokens, 512, 5)
    assert (found.oldest_s, found.newest_s) == (status.oldest_event_s, status.newest_event_s)
    assert snapshots.clear(path)
    assert list(path.parent.iterdir()) == []


def test_a_save_is_a_moment_of_the_context_though_asks_go_on_meanwhile() -> None:
    engine = DrivenEngine()
    engine.observe(reading(0))
    engine.settle()
    taken: list[Snapshot] = []
    engine.save(taken.append)
    engine.turn()
    engine._saver.finish(engine._snapshot, None, 10)
    engine.observe(reading(1))
    engine.settle()
    assert len(taken) == 1
    assert taken[0].header.live.position < engine.live.position
    assert engine.status().counters["snapshots_saved"] == 1


def test_reading_waits_for_a_save_and_asks_do_not() -> None:
    engine = DrivenEngine()
    engine.observe(reading(0))
    engine.settle()
    engine._context.freeze()
    before = list(engine.live.trace)
    engine.observe(frame(1))
    assert engine.answer()
    assert engine.live.trace == before
    engine._context.thaw()
    engine.settle()
    assert len(engine.live.trace) > len(before)


def test_a_save_that_fails_is_counted_and_costs_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    engine = DrivenEngine()

    def full(snapshot: Snapshot) -> None:
        raise OSError(28, "No space left on device")

    engine.save(full)
    engine.turn()
    engine._saver.finish(engine._snapshot, full, 10)
    assert "No space left" in caplog.text
    assert engine.status().counters["snapshots_failed"] == 2
    engine.observe(reading(0))
    assert engine.answer()
