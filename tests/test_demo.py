"""The demo shows the whole way working, in time and beside the truth, and leaves nothing behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoints import copy_checkpoint
from patience import PATIENCE_S

from iotd.demo import package
from iotd.demo.devices import Devices, Report
from iotd.demo.home import Home
from iotd.demo.ledger import SETTLED_S, Ledger
from iotd.demo.questions import KIND_WEIGHTS
from iotd.errors import CheckpointError
from iotd.model import Model
from iotd.model.package import DECODER, MANIFEST


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo's model lies after the first run."""
    return tmp_path_factory.mktemp("cache")


def demo(cache: Path, tmp_path: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "iotd", "demo", *args],
        env=os.environ | {"XDG_CACHE_HOME": str(cache), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(pid: int) -> list[int]:
    """Every process below `pid`."""
    found = [
        int(child) for tasks in Path(f"/proc/{pid}/task").glob("*/children") for child in tasks.read_text().split()
    ]
    return [*found, *(below for child in found for below in children(child))]


def next_event(process: subprocess.Popen[str], event: str) -> dict[str, Any]:
    assert process.stdout is not None
    for line in process.stdout:
        told: dict[str, Any] = json.loads(line)
        if told["event"] == event:
            return told
    raise AssertionError(f"the demo ended without {event!r}: {process.stderr.read() if process.stderr else ''}")


def test_a_short_demo_tells_answers_beside_the_truth_and_whether_all_were_in_time(cache: Path, tmp_path: Path) -> None:
    """A machine that stalls makes one late, and the exit code then is 1."""
    process = demo(cache, tmp_path, "--for", "6s", "--json")
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert errors == ""
    told = [json.loads(line) for line in output.splitlines()]
    answers = [line for line in told if line["event"] == "answer"]
    assert all(answer["kind"] in KIND_WEIGHTS and answer["question"] and answer["truth"] for answer in answers)
    right = [answer for answer in answers if answer["right"]]
    in_time = [answer for answer in answers if answer["in_time"]]
    tally = told[-1]
    assert tally["ok"] is (len(in_time) == len(answers))
    assert process.returncode == (0 if tally["ok"] else 1)
    assert (tally["asked"], tally["right"], tally["in_time"]) == (len(answers), len(right), len(in_time))
    assert right
    assert tally["first_right_s"] > 0
    status = [line for line in told if line["event"] == "status"][-1]
    assert status["messages"] > 0
    assert status["frames"] > 0
    assert 0 < status["context_tokens"] <= status["context_window"]
    assert [line for line in told if "grpc" in line and "broker" not in line]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupted_demo_leaves_no_process_and_no_file_behind(
    cache: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = demo(cache, tmp_path, "--json")
    next_event(process, "answer")
    below = children(process.pid)
    assert len(below) >= 2
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (0, "")
    assert [pid for pid in below if Path(f"/proc/{pid}").exists()] == []
    assert list(tmp_path.iterdir()) == []
    assert [path.name for path in cache.iterdir()] == ["iotd"]


def test_in_a_pipe_the_demo_is_plain_text(cache: Path, tmp_path: Path) -> None:
    process = demo(cache, tmp_path, "--for", "1s", "--seed", "5")
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (0, "")
    assert "\x1b" not in output
    lines = output.splitlines()
    question = next(i for i, line in enumerate(lines) if line.startswith("? "))
    assert [line.strip().split(" ")[0] for line in lines[question + 2 : question + 4]] == ["truth", "in"]
    assert "iotd ask --target" in output
    assert lines[-1].startswith("questions asked 1, answered right ")


def test_a_daemon_that_dies_ends_the_demo_with_its_last_words(cache: Path, tmp_path: Path) -> None:
    process = demo(cache, tmp_path, "--json")
    next_event(process, "answer")
    daemon = next(pid for pid in children(process.pid) if b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(daemon, signal.SIGKILL)
    began_s = time.monotonic()
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert errors.startswith("iotd: ")
    assert time.monotonic() - began_s < 30


@pytest.fixture
def checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A small one in the place of the demo's own, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    folder = copy_checkpoint(tmp_path / "checkpoint")
    monkeypatch.setattr(package, "CHECKPOINT", folder)
    return folder


def test_the_demos_model_is_converted_once(checkpoint: Path) -> None:
    said: list[str] = []
    folder = package.demo_package(said.append)
    Model.open(folder, threads=1)
    assert package.demo_package(said.append) == folder
    assert said == [f"Converting the demo's model into {folder}"]


def test_a_package_that_is_damaged_is_converted_again(checkpoint: Path) -> None:
    said: list[str] = []
    folder = package.demo_package(said.append)
    whole = (folder / DECODER).read_bytes()
    for name, content in (
        (MANIFEST, b'{"format": 0}'),
        (DECODER, b"no graph"),
        (DECODER, whole[:-1] + bytes([whole[-1] ^ 1])),
    ):
        (folder / name).write_bytes(content)
        assert package.demo_package(said.append) == folder
        Model.open(folder, threads=1)
    assert len(said) == 4


def test_another_checkpoint_has_a_package_of_its_own(checkpoint: Path) -> None:
    before = package.demo_package(lambda _: None)
    (checkpoint / "README.md").write_text("trained for longer")
    after = package.demo_package(lambda _: None)
    assert before != after
    Model.open(before, threads=1)
    Model.open(after, threads=1)


def test_a_cache_that_cannot_be_written_is_said(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"cannot write beside .*/file/iotd/.*XDG_CACHE_HOME"):
        package.demo_package(lambda _: None)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def told_all(clock: Clock) -> Ledger:
    """A home's devices have each spoken once, some time ago."""
    ledger, devices = Ledger(clock), Devices(Home(6, lived_in=True), 6)
    for report in devices.states() + [report for _ in range(18) for report in devices.reports()]:
        ledger.tell(report)
    ledger.tell(devices.scene())
    clock.now_s += 10 * SETTLED_S
    return ledger


def door(state: str) -> Report:
    return Report("home/door/back", state, {"back door": state})


def test_a_home_is_asked_about_every_kind_of_thing() -> None:
    ledger, rng = told_all(Clock()), random.Random(0)
    for kind in KIND_WEIGHTS:
        question = ledger.question(rng, [kind])
        assert question is not None
        assert question.kind == kind
        assert question.right(question.answer)


def test_nothing_is_asked_before_every_device_has_spoken_for_a_while() -> None:
    clock, rng = Clock(), random.Random(0)
    ledger, devices = Ledger(clock), Devices(Home(6), 6)
    for report in devices.states() + [report for _ in range(18) for report in devices.reports()]:
        ledger.tell(report)
        clock.now_s += SETTLED_S
    assert ledger.question(rng, KIND_WEIGHTS) is None
    ledger.tell(devices.scene())
    assert ledger.question(rng, KIND_WEIGHTS) is None
    clock.now_s += 1.01 * SETTLED_S
    assert ledger.question(rng, KIND_WEIGHTS) is not None


def test_a_question_waits_until_its_answer_is_settled() -> None:
    """What is told meanwhile about other things does not hold it up."""
    clock = Clock()
    ledger, rng = told_all(clock), random.Random(0)
    for state, other in (("open", "closed"), ("closed", "open")):
        ledger.tell(door(other))
        clock.now_s += 1.01 * SETTLED_S
        assert ledger.question(rng, ["any door"]) is not None
        ledger.tell(door(state))
        assert ledger.question(rng, ["any door"]) is None
        assert ledger.question(rng, ["warmest"]) is not None
        clock.now_s += 0.99 * SETTLED_S
        assert ledger.question(rng, ["any door"]) is None
        clock.now_s += 0.02 * SETTLED_S
        question = ledger.question(rng, ["any door"])
        assert question is not None
        assert ("back" in question.fact.words[0]) == (state == "open")


def test_a_door_that_opened_and_closed_meanwhile_is_not_settled() -> None:
    clock = Clock()
    ledger, rng = told_all(clock), random.Random(0)
    ledger.tell(door("closed"))
    clock.now_s += 1.01 * SETTLED_S
    before = ledger.question(random.Random(1), ["any door"])
    ledger.tell(door("open"))
    ledger.tell(door("closed"))
    assert ledger.question(rng, ["any door"]) is None
    clock.now_s += 1.01 * SETTLED_S
    assert before is not None
    assert ledger.question(random.Random(1), ["any door"]) == before
