"""Peers that are libraries run in a process of their own, and whatever goes wrong there is said."""

import os
import socket
from pathlib import Path

import pytest

from iotd.errors import InvalidInput, Unavailable
from iotd.ops import board
from iotd.ops.peers import LlamaServer, opened, servers

LLAMA = """
import os, time
print("a library that talks")

class Llama:
    def __init__(self, model_path, *, n_ctx, n_threads, n_threads_batch, verbose):
        assert (n_ctx, n_threads, n_threads_batch, verbose) == (600, 3, 3, False)
        if "broken" in model_path:
            raise ValueError("no model")
        self.read = []
    def reset(self):
        self.read = []
    def eval(self, tokens):
        if 13 in tokens:
            os._exit(3)
        assert tokens == [7] or not self.read, "a prompt is read anew"
        self.read += tokens
        time.sleep(0.01)
    def sample(self, *, temp):
        assert temp == 0
        return 7
"""

GENAI = """
import json, time

class Config:
    def __init__(self, path): self.threads = None
    def overlay(self, text):
        self.threads = json.loads(text)["model"]["decoder"]["session_options"]["intra_op_num_threads"]

class Model:
    def __init__(self, config): assert config.threads == 3

class GeneratorParams:
    def __init__(self, model): pass
    def set_search_options(self, *, do_sample, max_length, min_length):
        assert not do_sample and max_length == min_length
        self.length = max_length

class Generator:
    def __init__(self, model, params): self.left = params.length
    def append_tokens(self, ids): self.left -= len(ids)
    def generate_next_token(self):
        self.left -= 1
        assert self.left >= 0
        time.sleep(0.01)
"""


@pytest.fixture(autouse=True)
def _libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones in the place of llama_cpp and onnxruntime_genai, for the process that imports them."""
    place = tmp_path / "libraries"
    place.mkdir()
    (place / "llama_cpp.py").write_text(LLAMA)
    (place / "onnxruntime_genai.py").write_text(GENAI)
    monkeypatch.setenv("PYTHONPATH", str(place), prepend=os.pathsep)


@pytest.fixture
def gguf(tmp_path: Path) -> str:
    return str(tmp_path / "some.gguf")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "genai").mkdir()
    (tmp_path / "genai" / "genai_config.json").write_text("{}")
    return str(tmp_path / "genai")


def test_a_library_is_measured_in_its_own_process(gguf: str, folder: str) -> None:
    with opened([gguf, f"the other={folder}"], threads=3, capacity=600) as peers:
        assert [peer.name for peer in peers] == ["some.gguf", "the other"]
        for peer in peers:
            for _ in range(2):
                speeds = peer.speeds([1, 2, 3, 4], 5)
                assert 0 < speeds.prefill < 400
                assert 0 < speeds.decode < 100
            assert peer.pid
            assert board.resident_nbytes(peer.pid) > 1_000_000
            assert peer.pid != os.getpid()
        pids = [peer.pid for peer in peers]
    assert [board.resident_nbytes(pid) for pid in pids] == [0, 0]


def test_a_library_that_is_not_there_is_said_with_what_to_install(
    gguf: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("llama_cpp", "onnxruntime_genai"):
        (tmp_path / "libraries" / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})")
    for place, said in (
        (gguf, "needs llama_cpp: pip install llama-cpp-python"),
        (folder, "needs onnxruntime_genai: pip install onnxruntime-genai"),
    ):
        with pytest.raises(Unavailable, match=said), opened([place], threads=3, capacity=600):
            pass


def test_a_library_that_fails_or_dies_is_said(tmp_path: Path, gguf: str) -> None:
    broken = opened([str(tmp_path / "broken.gguf")], threads=3, capacity=600)
    with pytest.raises(Unavailable, match=r"broken\.gguf: ValueError: no model"), broken:
        pass
    with opened([gguf], threads=3, capacity=600) as (peer,):
        with pytest.raises(Unavailable, match="has ended with exit code 3"):
            peer.speeds([13], 1)
        with pytest.raises(Unavailable, match="has ended"):
            peer.speeds([1], 1)


@pytest.mark.parametrize("text", ["/nowhere", "localhost:8080", "x=/nowhere", ""])
def test_what_is_no_peer_is_said_so(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"is no peer: give the URL of .*a \.gguf file, or a folder"):
        opened([text], threads=3, capacity=600).__enter__()
    with pytest.raises(InvalidInput, match="is no URL"):
        servers([text])


def test_servers_are_named_by_their_address_or_as_they_are_told() -> None:
    named = servers(["http://127.0.0.1:8080/", "ik_llama.cpp=http://pi.local/v1?a=b"])
    assert [server.name for server in named] == ["127.0.0.1:8080", "ik_llama.cpp"]
    with pytest.raises(InvalidInput, match="one name"):
        servers(["a=http://b", "a=http://c"])


def test_the_process_behind_a_loopback_address_is_found() -> None:
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.create_server((host, 0), family=family) as listener:
            port = listener.getsockname()[1]
            assert LlamaServer(f"http://localhost:{port}").pid == os.getpid()
            assert LlamaServer(f"http://192.0.2.1:{port}").pid is None
        assert board.listener_pid(port) is None
