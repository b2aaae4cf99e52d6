"""Fetching a checkpoint, from a local server that stands in for the hub."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from patience import PATIENCE_S

from iotd.model import Model
from iotd.model.package import read_manifest

CHECKPOINT = Path(__file__).parent / "golden" / "untied"
COMMIT = hashlib.sha1(b"one").hexdigest()
REPO = "someone/Qwen3.5-tiny"


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that a download uses."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        server = self.server
        assert isinstance(server, HubServer)
        server.seen.append(f"{self.command} {path}")
        name = path.rpartition("/")[2]
        if path.startswith(f"/api/models/{REPO}/tree/"):
            files = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _etag(f)} for f in _files()]
            self._send(json.dumps(files).encode(), "application/json", {}, body)
        elif path.startswith(f"/api/models/{REPO}"):
            siblings = [{"rfilename": file.name} for file in _files()]
            info = {"id": REPO, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
            self._send(json.dumps(info).encode(), "application/json", {}, body)
        elif path.startswith(f"/{REPO}/resolve/") and (CHECKPOINT / name).exists():
            headers = {"ETag": f'"{_etag(CHECKPOINT / name)}"', "X-Repo-Commit": COMMIT}
            self._send((CHECKPOINT / name).read_bytes(), "application/octet-stream", headers, body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, data: bytes, kind: str, headers: dict[str, str], body: bool) -> None:
        self.send_response(200)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


class HubServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Hub)
        self.seen: list[str] = []


def _files() -> list[Path]:
    return sorted(CHECKPOINT.iterdir())


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def pull(endpoint: str, home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does: the hub's address is read when its library is imported."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "iotd", "pull", *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_a_checkpoint_is_fetched_and_converted(hub: HubServer, tmp_path: Path) -> None:
    """`iotd pull` makes a package that knows where it came from; a second time nothing is fetched again."""
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    done = pull(endpoint, tmp_path / "hf", REPO, str(tmp_path / "package"), "--recipe", "fp32")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "package")
    assert (manifest.source.repo, manifest.source.revision) == (REPO, COMMIT)
    assert Model.open(tmp_path / "package").name == "Qwen3.5-tiny fp32"
    assert not any("expected.npz" in request for request in hub.seen)
    hub.seen.clear()
    again = pull(endpoint, tmp_path / "hf", REPO, str(tmp_path / "again"))
    assert again.returncode == 0, again.stderr
    assert not any("GET" in request and "safetensors" in request for request in hub.seen)


def test_an_unknown_repository_is_one_sentence(hub: HubServer, tmp_path: Path) -> None:
    """What the hub does not have is named; nothing is written."""
    done = pull(f"http://127.0.0.1:{hub.server_port}", tmp_path / "hf", "someone/else", str(tmp_path / "package"))
    assert done.returncode == 1
    assert "cannot fetch someone/else" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "package").exists()


def test_an_unreachable_hub_is_one_sentence(tmp_path: Path) -> None:
    """A hub that does not answer is an error that says so."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    done = pull(f"http://127.0.0.1:{port}", tmp_path / "hf", REPO, str(tmp_path / "package"))
    assert done.returncode == 1
    assert f"cannot fetch {REPO}" in done.stderr
    assert "Traceback" not in done.stderr
