"""Compute threads: they spin only while the model runs, and keep to their cores where they are to."""

import os
from pathlib import Path

import pytest

from iotd.app import open_engine
from iotd.config import Config, ModelConfig
from iotd.model import Model
from iotd.model.package import DECODER
from iotd.model.session import Threads, open_session


def cores_of_threads() -> dict[str, str]:
    """By thread of this process."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        lines = (task / "status").read_text().splitlines()
        found[task.name] = next(line.split()[1] for line in lines if line.startswith("Cpus_allowed_list:"))
    return found


def test_spinning_ends_with_a_run(tiny_package: Path) -> None:
    for threads, allowed, stop in ((Threads(2), "1", "1"), (Threads(2, spinning=False), "0", None)):
        options = open_session(tiny_package / DECODER, threads).get_session_options()
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == allowed
        if stop:
            assert options.get_session_config_entry("session.force_spinning_stop") == stop


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core")
def test_threads_with_affinity_keep_to_the_last_cores(tiny_package: Path) -> None:
    before = cores_of_threads()
    session = open_session(tiny_package / DECODER, Threads(2, affinity=True))
    started = {thread: cores for thread, cores in cores_of_threads().items() if thread not in before}
    assert [*started.values()] == [str(max(os.sched_getaffinity(0)))]
    del session


@pytest.mark.parametrize(
    ("count", "cores", "expected"),
    [
        (4, {0, 1, 2, 3}, "2;3;4"),
        (3, {0, 1, 2, 3}, "3;4"),
        (3, {4, 6, 9}, "7;10"),
        (4, {0, 1, 2}, "2;3;2"),
        (1, {0, 1}, None),
        (2, {0}, None),
    ],
)
def test_each_thread_but_the_callers_has_a_core(
    count: int, cores: set[int], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted from 1, as onnxruntime does."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    assert Threads(count, affinity=True).entries.get("session.intra_op_thread_affinities") == expected
    assert "session.intra_op_thread_affinities" not in Threads(count).entries


def test_the_daemon_takes_them_from_its_configuration(monkeypatch: pytest.MonkeyPatch, tiny_package: Path) -> None:
    class Opened(Exception):
        pass

    def opened(_path: str, **options: object) -> None:
        raise Opened(options["threads"], options["spinning"], options["affinity"])

    monkeypatch.setattr(Model, "open", opened)
    with pytest.raises(Opened) as found:
        open_engine(Config(model=ModelConfig(path=str(tiny_package), threads=3, spinning=False, affinity=True)))
    assert found.value.args == (3, False, True)
