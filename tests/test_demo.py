"""The demo shows the whole way working, in time, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from iotd.demo import run
from iotd.model import Model
from iotd.model.package import DECODER, MANIFEST

START_S = 90.0


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


def test_a_short_demo_answers_in_time_and_says_so(cache: Path, tmp_path: Path) -> None:
    process = demo(cache, tmp_path, "--for", "4s", "--json")
    output, errors = process.communicate(timeout=START_S)
    assert (process.returncode, errors) == (0, "")
    told = [json.loads(line) for line in output.splitlines()]
    answers = [line for line in told if line["event"] == "answer"]
    assert answers
    assert all(answer["in_time"] and answer["total_s"] <= answer["budget_s"] + 0.25 for answer in answers)
    assert told[-1]["ok"] is True
    status = [line for line in told if line["event"] == "status"][-1]
    assert status["messages"] > 0
    assert status["frames"] > 0
    assert status["context_tokens"] > 0
    assert [line for line in told if "grpc" in line and "broker" not in line]
    assert any("noise" in line.get("text", "") for line in told)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupted_demo_leaves_no_process_and_no_file_behind(
    cache: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = demo(cache, tmp_path, "--json")
    next_event(process, "answer")
    below = children(process.pid)
    assert len(below) >= 2
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert [pid for pid in below if Path(f"/proc/{pid}").exists()] == []
    assert list(tmp_path.iterdir()) == []
    assert [path.name for path in cache.iterdir()] == ["iotd"]


def test_in_a_pipe_the_demo_is_plain_text(cache: Path, tmp_path: Path) -> None:
    process = demo(cache, tmp_path, "--for", "1s")
    output, errors = process.communicate(timeout=START_S)
    assert (process.returncode, errors) == (0, "")
    assert "\x1b" not in output
    assert "in time" in output
    assert "iotd ask --target" in output


def test_a_daemon_that_dies_ends_the_demo_with_its_last_words(cache: Path, tmp_path: Path) -> None:
    process = demo(cache, tmp_path, "--json")
    next_event(process, "answer")
    daemon = next(pid for pid in children(process.pid) if b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(daemon, signal.SIGKILL)
    began_s = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith("iotd: ")
    assert time.monotonic() - began_s < 30


def test_a_package_that_this_iotd_cannot_open_is_converted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    folder = run._package()
    for name, content in ((MANIFEST, b'{"format": 0}'), (DECODER, b"no graph")):
        (folder / name).write_bytes(content)
        assert run._package() == folder
        Model.open(folder, threads=1)
