"""Threads are chosen by a rule, from what was measured in turn."""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from iotd.cli import commands
from iotd.config import load
from iotd.ops import bench_tune
from iotd.ops.bench_tune import Setting, Tried, choose, settings
from iotd.ops.peers import Speeds


def tried(*found: tuple[int, bool, bool, float, float]) -> list[Tried]:
    return [Tried(Setting(*setting), Speeds(prefill, decode)) for *setting, decode, prefill in found]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        # Four threads are faster, and not enough to give the last core away.
        ([(3, True, False, 95.0, 80.0), (4, True, False, 100.0, 110.0)], (3, True, False)),
        ([(3, True, False, 94.9, 80.0), (4, True, False, 100.0, 110.0)], (4, True, False)),
        # A spare core comes before threads that sleep, and both before threads that the kernel places.
        ([(4, False, False, 100.0, 99.0), (3, True, False, 99.0, 80.0)], (3, True, False)),
        ([(3, True, False, 100.0, 80.0), (3, False, True, 96.0, 80.0)], (3, False, True)),
        ([(3, False, True, 100.0, 80.0), (3, False, False, 96.0, 70.0)], (3, False, False)),
        # What is given away is never more than once.
        (
            [(3, True, False, 96.0, 80.0), (3, False, False, 92.0, 80.0), (4, True, False, 100.0, 99.0)],
            (3, True, False),
        ),
        # Of equals the one that reads fastest.
        ([(2, False, False, 100.0, 60.0), (3, False, False, 97.0, 80.0)], (3, False, False)),
    ],
)
def test_the_choice(found: list[tuple[int, bool, bool, float, float]], expected: tuple[int, bool, bool]) -> None:
    assert choose(tried(*found), cores=4) == Setting(*expected)


def test_all_settings_that_differ_are_tried() -> None:
    assert settings(1) == [Setting(1, False, False)]
    assert len(set(settings(4))) == len(settings(4)) == 1 + 3 * 4
    assert settings(99) == settings(bench_tune.MOST_THREADS)


def test_settings_take_turns(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    turns: list[Setting] = []

    def speeds(package: Path, setting: Setting) -> Speeds:
        turns.append(setting)
        return Speeds(len(turns), setting.threads)

    monkeypatch.setattr(bench_tune, "_speeds", speeds)
    advanced: list[int] = []
    found = bench_tune.run(tiny_package, repeat=3, advance=advanced.append)
    assert turns == settings(2) * 3
    assert len(advanced) == 15
    assert found[0] == Tried(Setting(1, False, False), Speeds(6, 1))


@pytest.mark.parametrize("command", ["tune", "--tune"])
def test_the_choice_is_written_into_a_configuration(command: str, tiny_package: Path, tmp_path: Path) -> None:
    path = tmp_path / "iotd.yaml"
    path.write_text("model:\n  # here\n  threads: 7\n")
    args = ["bench", command, str(tiny_package), "--repeat", "1", "--json", "--write", str(path)]
    result = CliRunner().invoke(commands, args, catch_exceptions=False)
    lines = [json.loads(line) for line in result.output.splitlines()]
    (chosen,) = (line for line in lines if line["chosen"])
    model = load(path, {}).model
    assert (model.threads, model.spinning, model.affinity) == tuple(
        chosen[k] for k in ("threads", "spinning", "affinity")
    )
    assert "  # here\n" in path.read_text()


def test_a_configuration_with_errors_is_told_before_anything_is_tried(tiny_package: Path, tmp_path: Path) -> None:
    path = tmp_path / "iotd.yaml"
    path.write_text("model: 3\n")
    result = CliRunner().invoke(commands, ["bench", "--tune", "/nowhere", "--write", str(path)])
    assert "model: 3 is not allowed" in str(result.exception)
