"""Other engines to measure against, in the same run and on the same machine: servers that run, and libraries.

They are given token ids: no tokenizer comes between. A library runs in a process of its own (`iotd.ops.peer_child`).
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from iotd.address import is_loopback
from iotd.errors import InvalidInput, Unavailable
from iotd.ops import board

TIMEOUT_S = 600.0
STOP_S = 10.0


@dataclass(frozen=True, slots=True)
class Speeds:
    """Tokens per second."""

    prefill: float
    decode: float


class Peer(Protocol):
    """One engine with one model. Between two calls it computes nothing."""

    @property
    def name(self) -> str: ...

    @property
    def pid(self) -> int | None:
        """Whose memory is the engine's; None where that cannot be told."""

    def speeds(self, ids: Sequence[int], n_predict: int) -> Speeds:
        """Of a prompt that is read anew, and of so many greedy tokens after it. Raises Unavailable."""


@contextmanager
def opened(texts: Sequence[str], *, threads: int, capacity: int) -> Iterator[list[Peer]]:
    """The peers that are named so, up to the end of the context.

    texts: each the URL of a llama.cpp server, a `.gguf` file, or a folder that onnxruntime-genai reads, with `NAME=` in
    front of it or without. threads, capacity: of those that are opened here; a server has its own.
    Raises InvalidInput for what is none of these, Unavailable for what cannot be opened.
    """
    with ExitStack() as stack:
        peers: list[Peer] = []
        for name, place in _named(texts):
            if _is_url(place):
                peers.append(LlamaServer(place, name))
            elif Path(place).suffix == ".gguf" or (Path(place) / "genai_config.json").is_file():
                peers.append(stack.enter_context(ChildPeer(name, Path(place), threads, capacity)))
            else:
                raise InvalidInput(
                    f"{place} is no peer: give the URL of a llama.cpp server, a .gguf file, or a folder with a "
                    "genai_config.json",
                    field="vs",
                )
        yield peers


def servers(texts: Sequence[str]) -> list["LlamaServer"]:
    """The same, where a server alone will do."""
    named = _named(texts)
    for _, place in named:
        if not _is_url(place):
            raise InvalidInput(f"{place} is no URL: only a llama.cpp server can be asked over a context", field="vs")
    return [LlamaServer(place, name) for name, place in named]


def _named(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Names, and what they stand for."""
    found = []
    for text in texts:
        match = re.fullmatch(r"([\w. -]+)=(.+)", text)
        place = match[2] if match else text
        found.append((match[1] if match else urlsplit(place).netloc or Path(place).name, place))
    if len({name for name, _ in found}) < len(found):
        raise InvalidInput("two peers have one name: write NAME= in front of them", field="vs")
    return found


def _is_url(place: str) -> bool:
    return place.startswith(("http://", "https://"))


class LlamaServer:
    """One slot of a server of llama.cpp or its kin. Every method raises Unavailable where it does not answer as one."""

    def __init__(self, url: str, name: str = "llama.cpp") -> None:
        """url: such as `http://127.0.0.1:8080`."""
        self.name = name
        self._url = url.rstrip("/")

    @property
    def pid(self) -> int | None:
        at = urlsplit(self._url)
        return board.listener_pid(at.port or 80) if is_loopback(at.hostname or "") else None

    def first_token_s(self, ids: Sequence[int]) -> float:
        """From the request to its first token. What the server has cached of the prompt, it need not read again."""
        began_s = time.monotonic()
        first_s: float | None = None
        for _ in self._complete(ids, 1, cache=True):
            first_s = first_s or time.monotonic() - began_s
        if first_s is None:
            raise Unavailable(f"{self._url} has answered with nothing")
        return first_s

    def speeds(self, ids: Sequence[int], n_predict: int) -> Speeds:
        """As the server itself tells them. Its first token belongs to the prompt, in time though not in number."""
        events = [{}, *self._complete(ids, n_predict + 1, cache=False)]
        timings = events[-1].get("timings", {})
        try:
            return Speeds(
                1e3 * timings["prompt_n"] / timings["prompt_ms"],
                1e3 * (timings["predicted_n"] - 1) / timings["predicted_ms"],
            )
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise Unavailable(f"{self._url} tells no timings: is it llama.cpp's server?") from error

    def json_speed(self, ids: Sequence[int], schema: dict[str, Any], n_predict: int) -> float:
        """Characters per second of a greedy answer under a JSON schema, from its first one on."""
        text, began_s, ended_s = "", 0.0, 0.0
        for event in self._complete(ids, n_predict, cache=True, json_schema=schema, ignore_eos=False):
            ended_s = time.monotonic()
            began_s = began_s or ended_s
            text += event.get("content", "")
        if not text or ended_s <= began_s:
            raise Unavailable(f"{self._url} has answered with nothing")
        return len(text) / (ended_s - began_s)

    def _complete(self, ids: Sequence[int], n_predict: int, *, cache: bool, **options: Any) -> Iterator[dict[str, Any]]:
        """The events of a streamed completion (llama.cpp's tools/server/README.md, `POST /completion`)."""
        body = {
            "prompt": [*ids],
            "n_predict": n_predict,
            "cache_prompt": cache,
            "stream": True,
            "temperature": 0.0,
            "ignore_eos": True,
            **options,
        }
        try:
            headers = {"Content-Type": "application/json"}
            request = Request(f"{self._url}/completion", json.dumps(body).encode(), headers)
            with urlopen(request, timeout=TIMEOUT_S) as reply:
                for line in reply:
                    if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                        yield _event(json.loads(line.removeprefix(b"data: ")))
        except (OSError, HTTPException, ValueError) as error:
            raise Unavailable(f"{self._url} does not answer as llama.cpp's server: {error}") from error


def _event(data: Any) -> dict[str, Any]:
    """Raises ValueError for what is no part of a completion."""
    if not isinstance(data, dict) or "error" in data:
        raise ValueError(f"it says {data}")
    return data


class ChildPeer:
    """A library with a model, in a process of its own: its memory can be told, and its threads are nobody else's."""

    def __init__(self, name: str, path: Path, threads: int, capacity: int) -> None:
        """Raises Unavailable where the library is missing or does not open the model."""
        self.name = name
        command = [sys.executable, "-m", "iotd.ops.peer_child", str(path), str(threads), str(capacity)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self._reply()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "ChildPeer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def speeds(self, ids: Sequence[int], n_predict: int) -> Speeds:
        """As its own process has measured them."""
        assert self._process.stdin
        try:
            print(json.dumps({"ids": [*ids], "n_predict": n_predict}), file=self._process.stdin, flush=True)
        except OSError as error:
            raise Unavailable(f"{self.name} has ended: {error}") from error
        took = self._reply()
        return Speeds(len(ids) / took["prefill_s"], n_predict / took["decode_s"])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate(timeout=STOP_S)

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise Unavailable(f"{self.name} has ended with exit code {self._process.wait(STOP_S)}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise Unavailable(f"{self.name}: {reply['error']}")
        return reply
