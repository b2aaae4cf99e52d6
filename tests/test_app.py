"""The daemon starts in order, says what it does, reloads what it can, and stops without losing an answer."""

import asyncio
import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from daemon import ServeProcess, serving, write_config
from grpc_health.v1 import health_pb2, health_pb2_grpc
from patience import PATIENCE_S

from iotd.app import Daemon, _not_loaded, threads
from iotd.client import Client
from iotd.config import Config, GrpcConfig, ModelConfig
from iotd.errors import InvalidInput, Unavailable
from iotd.events import FinishReason, ServerStatus, ServingState

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
LONG = 400
"""Answer tokens that take the tiny model a good while."""


@pytest.fixture
def settings(tiny_package: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(tiny_package), "threads": 1},
        "context": {"window": 256, "chunk_tokens": 16, "system": "Watch the home."},
        "ask": {"reserve_tokens": 1024, "max_tokens": LONG, "budget_s": 60},
    }


@pytest.fixture
def daemon(tmp_path: Path, settings: dict[str, Any]) -> Iterator[ServeProcess]:
    with serving(tmp_path, settings) as process:
        yield process.wait_ready()


class Manager:
    """systemd's end of the notify socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(PATIENCE_S)
        self._socket.bind(str(path))

    def wait(self, wanted: Callable[[str], bool]) -> str:
        """The next message that is wanted; others are passed over."""
        while not wanted(message := self._socket.recv(4096).decode()):
            pass
        return message

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.close()


def test_a_question_is_answered(daemon: ServeProcess) -> None:
    with Client(daemon.target) as client:
        answer = client.answer("Is a door open?", max_tokens=8, budget_s=30)
    assert answer.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
    assert 0 < answer.usage.generation_tokens <= 8


def test_the_first_line_says_where_and_what(daemon: ServeProcess) -> None:
    ready = next(json.loads(line) for line in daemon.log if json.loads(line)["message"] == "ready")
    assert (ready["grpc"], ready["broker"], ready["window"]) == (daemon.target, "none", 256)
    assert ready["model"]


def test_sigterm_lets_a_running_answer_end_and_refuses_new_ones(daemon: ServeProcess) -> None:
    with Client(daemon.target) as client:
        running = client.ask("Tell a long story.", max_tokens=64, use_context=False)
        pieces = iter(running)
        next(pieces)
        daemon.send(signal.SIGTERM)
        for _ in pieces:
            pass
        assert running.result.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
        assert daemon.wait() == 0
        with pytest.raises(Unavailable):
            client.answer("And now?", budget_s=1)


def test_a_second_signal_leaves_at_once(daemon: ServeProcess) -> None:
    with Client(daemon.target) as client:
        running = client.ask("Tell a long story.", max_tokens=LONG, use_context=False)
        next(iter(running))
        # Held meanwhile, it cannot be done with the answer, and with its stop, between the two.
        for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
            daemon.send(number)
        assert daemon.wait() in (128 + signal.SIGINT, 128 + signal.SIGTERM)


def test_a_stop_while_loading_is_clean(tmp_path: Path, settings: dict[str, Any]) -> None:
    with serving(tmp_path, settings) as process:
        process.wait_log("loading")
        process.send(signal.SIGTERM)
        assert process.wait() == 0


def test_a_missing_model_is_one_sentence_and_exit_code_1(tmp_path: Path) -> None:
    with serving(tmp_path, {"model": {"path": str(tmp_path / "nothing")}}) as process:
        error = process.wait_log("iotd cannot start")
        assert str(tmp_path / "nothing") in error["message"]
        assert "iotd convert" in error["message"]
        assert "trace" not in error
        assert process.wait() == 1


def test_a_taken_port_is_one_sentence_and_exit_code_1(tmp_path: Path, settings: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with serving(tmp_path, settings | {"grpc": {"listen": f"127.0.0.1:{port}"}}) as process:
            assert str(port) in process.wait_log("iotd cannot start")["message"]
            assert process.wait() == 1


def test_a_wrong_configuration_is_told_without_a_trace_and_exit_code_1(tmp_path: Path) -> None:
    with serving(tmp_path, {"ask": {"queue": 0}}) as process:
        assert process.wait() == 1
        assert process.log[0].startswith("iotd: ask.queue: 0 is not allowed")
        assert len(process.log) == 1


def test_sighup_applies_limits_and_says_what_needs_a_restart(
    tmp_path: Path, daemon: ServeProcess, settings: dict[str, Any]
) -> None:
    settings["ask"] |= {"max_tokens": 3, "max_images": 0}
    settings["context"]["window"] = 512
    write_config(tmp_path, settings)
    daemon.send(signal.SIGHUP)
    message = daemon.wait_log("reloaded")["message"]
    assert message.endswith("a restart is needed for context.window")
    with Client(daemon.target) as client:
        assert client.answer("Is a door open?", temperature=0).usage.generation_tokens <= 3
        with pytest.raises(InvalidInput, match="images"):
            client.answer("What is this?", images=[b"\xff\xd8\xff"])


def test_a_reload_with_errors_changes_nothing(tmp_path: Path, daemon: ServeProcess, settings: dict[str, Any]) -> None:
    write_config(tmp_path, settings | {"ask": {"max_tokens": 3, "queue": 0}})
    daemon.send(signal.SIGHUP)
    assert "ask.queue" in daemon.wait_log("not reloaded")["message"]
    with Client(daemon.target) as client:
        assert client.answer("Is a door open?", max_tokens=5).usage.generation_tokens <= 5


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: " + 5000 * "["])
def test_a_reload_of_what_yaml_cannot_hold_changes_nothing(tmp_path: Path, daemon: ServeProcess, text: str) -> None:
    (tmp_path / "iotd.yaml").write_text(text)
    daemon.send(signal.SIGHUP)
    assert "iotd.yaml" in daemon.wait_log("not reloaded")["message"]
    with Client(daemon.target) as client:
        assert client.status().engine.ready


def idle_daemon(read: Callable[[], Config]) -> Daemon:
    """On the running loop; not started."""
    return Daemon(Config(grpc=GrpcConfig(listen="127.0.0.1:0")), read)


def test_a_defect_in_a_reload_is_logged_with_its_trace_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Config:
        raise ZeroDivisionError("odd")

    async def reload() -> ServerStatus:
        daemon = idle_daemon(broken)
        daemon._reload()
        return daemon.status()

    assert asyncio.run(reload()).state is ServingState.LOADING
    assert "ZeroDivisionError: odd" in caplog.text


def test_health_follows_the_engines_progress() -> None:
    """A stalled engine is not serving; one that moves again is. Neither is draining."""
    idle_s = [0.0]
    engine: Any = SimpleNamespace(progress_s=lambda: idle_s[0], status=lambda: _not_loaded(128))

    async def watch() -> None:
        daemon = idle_daemon(Config)
        port = await daemon._server.start()
        daemon._server.set_serving(True)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            states = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
            while (await states.read()).status != SERVING:
                pass
            for idle_s[0], expected in ((1000.0, NOT_SERVING), (0.0, SERVING)):
                daemon._tick(engine)
                assert (await states.read()).status == expected
                assert daemon.status().state is ServingState.SERVING
            states.cancel()
        await daemon._server.stop(0.0)

    asyncio.run(watch())


def test_what_keeps_the_daemon_from_starting_names_its_key(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings["context"]["system"] = "Watch the home. " * 99
    with serving(tmp_path, settings) as process:
        assert "context.system: " in process.wait_log("iotd cannot start")["message"]
        assert process.wait() == 1


def test_systemd_hears_the_whole_life(tmp_path: Path, settings: dict[str, Any], manager: Manager) -> None:
    """Loading asks for time, then ready, a fed watchdog, a reload from begin to end, and the stop."""
    env = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "2000000"}
    with serving(tmp_path, settings, env) as process:
        assert manager.wait(lambda m: True).startswith("EXTEND_TIMEOUT_USEC=")
        assert "STATUS=context " in manager.wait(lambda m: m.startswith("READY=1"))
        manager.wait(lambda m: m == "WATCHDOG=1")
        process.wait_ready()
        process.send(signal.SIGHUP)
        assert "MONOTONIC_USEC=" in manager.wait(lambda m: m.startswith("RELOADING=1"))
        manager.wait(lambda m: m.startswith("READY=1"))
        process.send(signal.SIGTERM)
        manager.wait(lambda m: m.startswith("STOPPING=1"))
        assert process.wait() == 0


def test_status_is_told_while_asks_run(daemon: ServeProcess) -> None:
    with Client(daemon.target) as client:
        begun = threading.Event()

        def ask() -> None:
            for _ in client.ask("Tell a long story.", max_tokens=64, use_context=False):
                begun.set()

        asking = threading.Thread(target=ask)
        asking.start()
        assert begun.wait(PATIENCE_S)
        status = client.status()
        asking.join(PATIENCE_S)
    assert status.engine.ready
    assert status.engine.context_window == 256
    assert status.resident_nbytes > 10_000_000
    assert status.link is None


@pytest.mark.parametrize(("configured", "cores", "expected"), [(0, 1, 1), (0, 4, 3), (0, 16, 4), (2, 16, 2)])
def test_threads_leave_a_core_to_the_daemon(
    configured: int, cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iotd.ops.board.cores", lambda: cores)
    assert threads(Config(model=ModelConfig(threads=configured))) == expected
