"""The benchmarks measure what they say, on a tiny model, and speak to llama.cpp's server as it expects."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from iotd.errors import Unavailable
from iotd.ops import bench, bench_context, bench_profile
from iotd.ops.peers import LlamaServer, Speeds


class Peer(ThreadingHTTPServer):
    """The part of llama.cpp's HTTP interface that a measurement uses."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.timings: dict[str, float] | None = {"prompt_per_second": 90.0, "predicted_per_second": 30.0}
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
    found = {f.name: f for f in bench.run(tiny_package, threads=1, repeat=2, peer=LlamaServer(peer.url))}
    assert found["decode at 512, llama.cpp"].median == 30
    ours, ratio = found["prefill 512, in turn"], found["prefill 512, ratio"]
    assert ratio.lowest == pytest.approx(ours.lowest / 90)
    assert ratio.highest == pytest.approx(ours.highest / 90)
    assert all(asked["cache_prompt"] is False and len(asked["prompt"]) == 512 for asked in peer.asked)
    assert found["resident, text"].median > found["anonymous, text"].median > 0
    assert found["image 256 × 256"].median > 0


def test_a_peer_is_asked_new_questions_over_the_same_context(tiny_package: Path, peer: Peer) -> None:
    llama = LlamaServer(peer.url)
    found = [*bench_context.run(tiny_package, threads=1, repeat=2, lengths=(200, 300), peer=llama)]
    names = [figure.name for figure in found]
    assert [name for name in names if "llama.cpp" in name] == [
        "the same, llama.cpp over 200",
        "the same, llama.cpp over 300",
    ]
    asked = [request["prompt"] for request in peer.asked[:3]]
    assert all(prompt[:200] == asked[0][:200] and len(prompt) == 220 for prompt in asked)
    assert len({tuple(prompt) for prompt in asked}) == 3
    assert found[-1].name == "left behind by 100 forks"


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
    peer.timings = {"prompt_per_second": 1.0, "predicted_per_second": 2.0}
    assert LlamaServer(f"{peer.url}/").speeds([1, 2], 3) == Speeds(1.0, 2.0)
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
