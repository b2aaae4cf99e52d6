"""The benchmarks measure what they say, on a tiny model, and speak to llama.cpp's server as it expects."""

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from iotd.errors import Unavailable
from iotd.model.head import HeadKind
from iotd.ops import bench, bench_answers, bench_context, bench_profile, energy
from iotd.ops.peers import LlamaServer, Speeds

TIMINGS = {"prompt_n": 512, "prompt_ms": 5120.0, "predicted_n": 49, "predicted_ms": 1600.0}
"""100 tokens a second read, and 30 written after the first."""


class Peer(ThreadingHTTPServer):
    """The part of llama.cpp's HTTP interface that a measurement uses."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.timings: dict[str, float] | None = TIMINGS
        self.asked: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Peer)
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.append(asked)
        self.send_response(200 if self.path == "/completion" else 404)
        self.end_headers()
        for n in range(asked["n_predict"]):
            self._event({"content": f"token {n}", "stop": False})
        self._event({"content": "", "stop": True, **({"timings": server.timings} if server.timings else {})})
        self.wfile.write(b"data: [DONE]\n\n")  # as ik_llama.cpp ends

    def _event(self, data: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def peer() -> Iterator[Peer]:
    server = Peer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_speeds_are_measured_in_turn_with_a_peer(tiny_package: Path, peer: Peer) -> None:
    found = {f.name: f for f in bench.run(tiny_package, threads=1, repeat=2, peers=[LlamaServer(peer.url)])}
    assert found["decode at 512, llama.cpp"].median == pytest.approx(30)
    ours, ratio = found["prefill 512, iotd"], found["prefill 512, ratio to llama.cpp"]
    assert ratio.lowest == pytest.approx(ours.lowest / 100)
    assert ratio.highest == pytest.approx(ours.highest / 100)
    assert all(asked["cache_prompt"] is False and len(asked["prompt"]) == 512 for asked in peer.asked)
    assert [asked["n_predict"] for asked in peer.asked] == [bench.DECODE_STEPS + 1] * 3
    assert found["resident, text"].median > found["anonymous, text"].median > 0
    assert found["image 256 × 256"].median > 0
    assert not [f for f in found.values() if f.unit == "J/token"]


def test_several_peers_take_turns_with_the_package(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = []

    @dataclass
    class Other:
        name: str
        pid: int | None = None

        def speeds(self, ids: Sequence[int], n_predict: int) -> Speeds:
            turns.append(self.name)
            return Speeds(10.0, 5.0)

    package_speeds = bench.Ours.speeds
    monkeypatch.setattr(bench.Ours, "speeds", lambda *args: (turns.append("iotd"), package_speeds(*args))[1])
    others = [Other("a", os.getpid()), Other("b")]
    found = {f.name: f for f in bench.run(tiny_package, threads=1, repeat=2, peers=others)}
    assert turns == ["iotd", "a", "b"] * 3
    assert found["decode at 512, ratio to b"].median == pytest.approx(found["decode at 512, iotd"].median / 5)
    assert "resident, a" in found
    assert "resident, b" not in found


def test_energy_is_told_where_it_is_measured(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Meter:
        name = "processor"

        def joules(self, work: Callable[[], object]) -> float:
            work()
            return 96.0

    monkeypatch.setattr(energy, "meter", Meter)
    found = {f.name: f.median for f in bench.run(tiny_package, threads=1, repeat=1) if f.unit == "J/token"}
    assert found == {"prefill 512, processor": 96 / 512, "decode at 512, processor": 96 / bench.DECODE_STEPS}


def test_a_peer_is_asked_new_questions_over_the_same_context(tiny_package: Path, peer: Peer) -> None:
    llama = LlamaServer(peer.url)
    found = [*bench_context.run(tiny_package, threads=1, repeat=2, lengths=(200, 300), peers=[llama])]
    names = [figure.name for figure in found]
    assert [name for name in names if "llama.cpp" in name] == [
        "the same, llama.cpp over 200",
        "so many times sooner than llama.cpp",
        "the same, llama.cpp over 300",
        "so many times sooner than llama.cpp",
    ]
    asked = [request["prompt"] for request in peer.asked[:3]]
    assert all(prompt[:200] == asked[0][:200] and len(prompt) == 220 for prompt in asked)
    assert len({tuple(prompt) for prompt in asked}) == 3
    assert found[-1].name == "left behind by 100 forks"


def test_answers_are_written_under_the_same_schema_as_a_peers(tiny_package: Path, peer: Peer) -> None:
    llama = LlamaServer(peer.url)
    found = {figure.name: figure for figure in bench_answers.run(tiny_package, threads=1, repeat=2, peers=[llama])}
    assert [*found] == [
        "quoting, word by word",
        "quoting, guessed",
        "so many times faster",
        "JSON under a schema, iotd",
        "JSON under a schema, llama.cpp",
        "so many times faster than llama.cpp",
    ]
    assert all(figure.lowest > 0 for figure in found.values())
    assert [request["json_schema"] for request in peer.asked] == [bench_answers.SCHEMA] * 3
    assert not any(request["ignore_eos"] for request in peer.asked)


@pytest.mark.parametrize("head", ["two-stage", "coarse"])
def test_another_head_is_measured_where_it_is_asked_for(tiny_package: Path, head: HeadKind) -> None:
    found = [*bench.run(tiny_package, threads=1, repeat=1, head=head)]
    assert "decode at 512" in [figure.name for figure in found]


def test_a_profile_says_where_the_time_goes(tiny_int4_package: Path) -> None:
    found = [*bench_profile.run(tiny_int4_package, threads=1)]
    for what in ("decode", "prefill 128"):
        shares = [share for share in found if share.what == what]
        assert sum(share.part for share in shares) == pytest.approx(1)
        assert shares == sorted(shares, key=lambda share: -share.mean_ms)
        assert {"MatMulNBits", "LinearAttention", "GroupQueryAttention"} <= {share.operator for share in shares}
    reading, decoding = (next(s for s in found if s.what == what) for what in ("prefill 128", "decode"))
    assert reading.mean_ms > decoding.mean_ms > 0


def test_what_is_no_llama_server_is_said_so(peer: Peer) -> None:
    peer.timings = None
    with pytest.raises(Unavailable, match="tells no timings"):
        LlamaServer(peer.url).speeds([1, 2], 3)
    peer.timings = {"prompt_n": 2, "prompt_ms": 2000.0, "predicted_n": 5, "predicted_ms": 2000.0}
    assert LlamaServer(f"{peer.url}/").speeds([1, 2], 4) == Speeds(1.0, 2.0)
    with pytest.raises(Unavailable, match="404"):
        LlamaServer(f"{peer.url}/elsewhere").first_token_s([1])


@pytest.mark.parametrize("said", [{"error": {"code": 400, "message": "too long"}}, ["no", "completion"]])
def test_an_error_in_the_stream_is_no_first_token(peer: Peer, said: object) -> None:
    class Failing(_Handler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"data: {json.dumps(said)}\n\n".encode())

    peer.RequestHandlerClass = Failing
    for call in (lambda: LlamaServer(peer.url).first_token_s([1]), lambda: LlamaServer(peer.url).speeds([1], 2)):
        with pytest.raises(Unavailable, match="does not answer as llama"):
            call()


def test_what_is_no_address_is_said_so() -> None:
    with pytest.raises(Unavailable, match="localhost/completion"):
        LlamaServer("localhost").first_token_s([1])


def test_a_server_that_says_nothing_or_is_gone_is_said_so(peer: Peer) -> None:
    class Silent(_Handler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()

    peer.RequestHandlerClass = Silent
    with pytest.raises(Unavailable, match="has answered with nothing"):
        LlamaServer(peer.url).first_token_s([1])
    gone = Peer()
    gone.server_close()
    with pytest.raises(Unavailable, match="does not answer as llama"):
        LlamaServer(gone.url).first_token_s([1])
