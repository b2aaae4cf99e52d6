"""The command line: quick, quiet on Ctrl-C and closed pipes, and one clear sentence for what went wrong."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
from daemon import ServeProcess, serving, write_config
from patience import PATIENCE_S
from scripted_engine import ScriptedTicket, running

from iotd.cli import commands
from iotd.cli.options import DURATION

HEAVY = {"onnxruntime", "numpy", "cv2", "grpc", "paho", "rich", "yaml", "msgspec", "onnx", "asyncio"}


def iotd(
    *args: str, env: dict[str, str] | None = None, timeout_s: float = PATIENCE_S
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "iotd", *args],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | (env or {}),
        timeout=timeout_s,
    )


@pytest.fixture
def settings(tiny_package: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(tiny_package), "threads": 1},
        "context": {"window": 256, "chunk_tokens": 16, "system": "Watch the home."},
    }


@pytest.fixture
def daemon(tmp_path: Path, settings: dict[str, Any]) -> Iterator[ServeProcess]:
    with serving(tmp_path, settings) as process:
        yield process.wait_ready()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        port: int = s.getsockname()[1]
        return port


def test_help_loads_nothing_heavy() -> None:
    script = f"import sys, iotd.cli; print(sorted({HEAVY!r} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "[]\n"


@pytest.mark.parametrize("command", sorted(commands.commands))
def test_every_command_has_help(command: str) -> None:
    result = iotd(command, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"Usage: iotd {command}" in result.stdout


def test_version_is_told_both_ways() -> None:
    assert iotd("version").stdout == iotd("--version").stdout


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2s", 2), ("500ms", 0.5), ("1m30s", 90), ("1.5s", 1.5), ("3", 3), ("0.25", 0.25), ("1h", 3600), ("1s500ms", 1.5)],
)
def test_durations_have_units(text: str, seconds: float) -> None:
    assert DURATION.convert(text, None, None) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "s", "2 s", "-1s", "0", "0s", "2x", "1m30", "1s,2s", "inf", "nan", "9" * 400 + "d"]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        DURATION.convert(text, None, None)


@pytest.mark.parametrize(
    "args",
    [
        ["ask"],
        ["nonsense"],
        ["ask", "a", "--budget", "soon"],
        ["ask", "a", "--image", "/no"],
        ["ask", "a", "--temperature", "nan"],
        ["classify", "a"],
        ["classify", "a", "--label", "b", "--temperature", "0"],
        ["simulate", "--speed", "inf"],
        ["simulate", "--rate", "1e9"],
        ["simulate", "--frames", "nan"],
        ["convert", "--random", "tiny"],
    ],
)
def test_wrong_usage_is_exit_code_2(args: list[str]) -> None:
    result = iotd(*args)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Usage: iotd" in result.stderr


def test_an_answer_streams_to_the_terminal(daemon: ServeProcess) -> None:
    result = iotd("ask", "Is a door open?", "--target", daemon.target, "--max-tokens", "4", "--budget", "30s")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("\n")


def test_json_gives_one_event_a_line_and_how_it_ended(daemon: ServeProcess) -> None:
    result = iotd("ask", "Is a door open?", "--target", daemon.target, "--max-tokens", "4", "--no-context", "--json")
    *deltas, last = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(list(delta) == ["delta"] for delta in deltas)
    assert last["done"]["finish_reason"] in ("stop", "length")
    assert last["done"]["usage"]["generation_tokens"] <= 4
    assert last["done"]["timings"]["total_s"] > 0


@pytest.fixture
def thinker() -> Iterator[str]:
    """A server that thinks before it answers: its target."""

    def reply(ticket: ScriptedTicket) -> None:
        ticket.think("Let me\x1b[2J ", "see.")
        ticket.say("Yes.")
        ticket.finish()

    with running() as server:
        server.engine.script = reply
        yield server.target


def test_thoughts_are_lines_of_their_own_in_json_and_else_out_of_the_way(thinker: str) -> None:
    ask = ["ask", "Is a door open?", "--thinking", "--target", thinker]
    lines = [json.loads(line) for line in iotd(*ask, "--json").stdout.splitlines()]
    assert "".join(line.get("thought", "") for line in lines) == "Let me\x1b[2J see."
    assert "".join(line.get("delta", "") for line in lines) == "Yes."
    result = iotd(*ask)
    assert (result.stdout, result.stderr) == ("Yes.\n", "")


def test_a_terminal_shows_thoughts_dimmed_and_above_the_answer(thinker: str) -> None:
    """Without what could steer it."""
    ours, terminal = pty.openpty()
    args = [sys.executable, "-m", "iotd", "ask", "Is a door open?", "--thinking", "--target", thinker]
    answer = subprocess.check_output(args, stderr=terminal, timeout=PATIENCE_S, text=True)
    shown = os.read(ours, 4096).decode()
    os.close(terminal)
    os.close(ours)
    assert answer == "Yes.\n"
    thoughts, _, rest = re.sub(r"\x1b\[[02]?m", "", shown).partition("\r\n")
    assert (thoughts, rest[:5]) == ("Let me[2J see.", "stop:")
    assert "\x1b[2m" in shown


@pytest.mark.parametrize("as_file", [False, True])
def test_an_answer_keeps_to_a_schema(daemon: ServeProcess, tmp_path: Path, as_file: bool) -> None:
    """Cut off at any length; and what it takes is not loaded before."""
    schema = (
        '{"type": "object", "properties": {"room": {"type": "string"}, "n": {"type": "integer"}}, "required": ["n"]}'
    )
    maps = Path(f"/proc/{daemon.pid}/maps")
    assert "llguidance" not in maps.read_text()
    file = tmp_path / "schema.json"
    file.write_text(schema)
    args = ["--json-schema", str(file) if as_file else schema, "--max-tokens", "30"]
    result = iotd("ask", "Which room?", "--target", daemon.target, *args)
    assert (result.returncode, result.stderr) == (0, "")
    jsonschema.validate(json.loads(result.stdout), json.loads(schema))
    assert "llguidance" in maps.read_text()


def test_an_answer_is_one_of_the_choices_or_matches_an_expression(daemon: ServeProcess) -> None:
    ask = ["ask", "Is it warm?", "--target", daemon.target]
    assert iotd(*ask, "--choice", "yes", "--choice", "no").stdout in ("yes\n", "no\n")
    assert iotd(*ask, "--regex", "[xyz]{3}").stdout.strip("xyz") == "\n"


def test_labels_are_told_with_their_probabilities_the_likeliest_first(daemon: ServeProcess) -> None:
    args = ["classify", "Is it warm?", "--target", daemon.target, "--label", "yes", "--label", "no", "--label", "a"]
    result = iotd(*args, "--none-of-these")
    assert (result.returncode, result.stderr) == (0, "")
    *labels, none = [line.split("%  ") for line in result.stdout.splitlines()]
    assert {label for _, label in labels} == {"yes", "no", "a"}
    assert none[1] == "(none of these)"
    shown = [float(percent) for percent, _ in labels]
    assert shown == sorted(shown, reverse=True)
    assert sum(shown) + float(none[0]) == pytest.approx(100, abs=0.1)


def test_labels_in_json_are_one_object(daemon: ServeProcess) -> None:
    args = ["classify", "Is it warm?", "--target", daemon.target, "--label", "yes", "--label", "no", "--json"]
    told = json.loads(iotd(*args, "--length-normalized", "--temperature", "2").stdout)
    assert told["best"] == max(told["probabilities"], key=told["probabilities"].get)
    assert sum(told["probabilities"].values()) == pytest.approx(1)
    assert set(told["log_probabilities"]) == {"yes", "no"}
    assert told["none_probability"] is None
    assert told["usage"]["generation_tokens"] == 0
    assert told["timings"]["total_s"] > 0


def test_a_label_given_twice_is_one_sentence_and_exit_code_1(daemon: ServeProcess) -> None:
    result = iotd("classify", "Is it warm?", "--target", daemon.target, "--label", "yes", "--label", "yes")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "iotd: labels[1] is labels[0] again: give each label once\n"


def test_a_form_that_does_not_compile_is_one_sentence_and_exit_code_1(daemon: ServeProcess) -> None:
    result = iotd("ask", "Is it warm?", "--target", daemon.target, "--regex", "(a")
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "iotd: regex: unclosed group\n")


def test_an_unknown_camera_is_one_sentence_and_exit_code_1(daemon: ServeProcess) -> None:
    result = iotd("ask", "Who is there?", "--camera", "door", "--target", daemon.target)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("iotd: ")
    assert "'door'" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_daemon_that_is_not_there_is_one_sentence_and_exit_code_1() -> None:
    result = iotd("ask", "Anyone?", "--target", f"127.0.0.1:{free_port()}", "--budget", "1s")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("iotd: no iotd reached at 127.0.0.1:")


def test_ctrl_c_is_quiet(daemon: ServeProcess) -> None:
    args = ["ask", "Tell a long story.", "--target", daemon.target, "--max-tokens", "1000", "--budget", "60s", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "iotd", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors.strip()) == (130, "")


def test_a_closed_pipe_is_quiet(daemon: ServeProcess) -> None:
    args = ["ask", "Tell a long story.", "--target", daemon.target, "--max-tokens", "1000", "--budget", "60s", "--json"]
    process = subprocess.Popen([sys.executable, "-m", "iotd", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (1, b"")


def test_check_says_what_it_would_do(tmp_path: Path, settings: dict[str, Any]) -> None:
    result = iotd("check", "-c", str(write_config(tmp_path, settings)))
    assert (result.returncode, result.stderr) == (0, "")
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [
        ["ok", name] for name in ("config", "model", "quality", "head", "memory", "grpc", "broker")
    ]


def test_check_names_every_problem_with_its_remedy(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = {
            "model": {"path": str(tmp_path / "nothing")},
            "grpc": {"listen": f"127.0.0.1:{taken.getsockname()[1]}"},
            "mqtt": {"host": "127.0.0.1", "port": free_port()},
        }
        result = iotd("check", "-c", str(write_config(tmp_path, config)), "--json")
    told = json.loads(result.stdout)
    assert (result.returncode, told["ok"]) == (1, False)
    problems = {finding["name"]: finding for finding in told["findings"] if not finding["ok"]}
    assert sorted(problems) == ["broker", "grpc", "model"]
    assert all(finding["text"] and finding["remedy"] for finding in problems.values())


def test_check_tells_every_error_of_the_configuration(tmp_path: Path) -> None:
    path = write_config(tmp_path, {"mqtt": {"port": 0, "prot": 1}})
    result = iotd("check", "-c", str(path))
    assert (result.returncode, result.stderr) == (1, "")
    assert "mqtt.port: 0" in result.stdout
    assert "did you mean port?" in result.stdout


def test_check_takes_a_server_that_is_no_broker_for_a_problem(tmp_path: Path, settings: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        mqtt = {"host": "127.0.0.1", "port": server.getsockname()[1]}
        server.close()
        result = iotd("check", "-c", str(write_config(tmp_path, settings | {"mqtt": mqtt})), "--json")
    broker = json.loads(result.stdout)["findings"][-1]
    assert (broker["name"], broker["ok"]) == ("broker", False)


def test_the_saved_context_is_shown_and_cleared(tmp_path: Path, settings: dict[str, Any]) -> None:
    path = tmp_path / "context.snapshot"
    config = str(write_config(tmp_path, settings | {"snapshot": {"path": str(path)}}))
    assert "no snapshot" in iotd("state", "show", "-c", config).stdout
    with serving(tmp_path, settings | {"snapshot": {"path": str(path)}}) as process:
        process.wait_ready().stop()
    assert "of 256 tokens" in iotd("state", "show", "-c", config).stdout
    assert json.loads(iotd("state", "show", "-c", config, "--json").stdout)["window"] == 256
    path.write_bytes(path.read_bytes()[:-100])
    shown = iotd("state", "show", "-c", config)
    assert (shown.returncode, len(shown.stderr.splitlines())) == (1, 1)
    assert "cannot be read" in shown.stderr
    assert "removed" in iotd("state", "clear", "-c", config).stdout
    assert "none" in iotd("state", "clear", "-c", config).stdout


def test_a_configuration_that_saves_nothing_has_no_state_to_show(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = str(write_config(tmp_path, settings | {"snapshot": {"path": ""}}))
    shown = iotd("state", "show", "-c", config)
    assert shown.returncode != 0
    assert "snapshot.path is empty" in shown.stderr


def test_check_of_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    result = iotd("check", "-c", str(tmp_path / "absent.yaml"))
    assert result.returncode == 1
    assert "absent.yaml" in result.stdout
    assert "name a file" in result.stdout


def test_random_weights_without_a_place_say_what_to_give() -> None:
    assert "with --random give OUT alone" in iotd("convert", "--random", "tiny").stderr


def test_a_full_disk_is_one_sentence_and_exit_code_1() -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "iotd", "version"], check=False, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (result.returncode, result.stderr) == (1, "iotd: No space left on device\n")


@pytest.mark.parametrize(
    "args",
    [
        ["ask", "why?", "--key-file", "FILE"],
        ["ask", "why?", "--ca-file", "FILE"],
        ["ask", "why?", "--target", "localhost"],
        ["ask", "why?", "--max-tokens", "99999999999"],
        ["ask", b"\xff"],
        ["simulate", "--password-file", "FILE"],
    ],
)
def test_what_cannot_be_used_is_one_sentence_and_exit_code_1(tmp_path: Path, args: list[str | bytes]) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\x00")
    command = [sys.executable, "-m", "iotd", *(str(binary) if arg == "FILE" else arg for arg in args)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("iotd: ")
    assert result.stderr.count("\n") == 1


def test_a_hangup_before_the_daemon_listens_for_it_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGHUP)
    found = []
    monkeypatch.setattr("iotd.app.serve", lambda read: found.append(signal.getsignal(signal.SIGHUP)) or 0)
    try:
        assert commands.main(["serve"], standalone_mode=False) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert found == [signal.SIG_IGN]
