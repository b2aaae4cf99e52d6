"""Another engine to measure against, in the same run and on the same machine: llama.cpp's own server, already running.

It is spoken to as its users do, over HTTP, with prompts of token ids: no tokenizer comes between.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.request import Request, urlopen

from iotd.errors import Unavailable

TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Speeds:
    """Tokens per second, as the peer itself tells them."""

    prefill: float
    decode: float


class LlamaServer:
    """One slot of a llama.cpp server. Every method raises Unavailable where it does not answer as one."""

    def __init__(self, url: str) -> None:
        """url: such as `http://127.0.0.1:8080`."""
        self._url = url.rstrip("/")

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
        """Of a prompt that is read anew, and of so many tokens after it."""
        events = [{}, *self._complete(ids, n_predict, cache=False)]
        timings = events[-1].get("timings", {})
        try:
            return Speeds(float(timings["prompt_per_second"]), float(timings["predicted_per_second"]))
        except (KeyError, TypeError) as error:
            raise Unavailable(f"{self._url} tells no timings: is it llama.cpp's server?") from error

    def _complete(self, ids: Sequence[int], n_predict: int, *, cache: bool) -> Iterator[dict[str, Any]]:
        """The events of a streamed completion (llama.cpp's tools/server/README.md, `POST /completion`)."""
        body = {
            "prompt": [*ids],
            "n_predict": n_predict,
            "cache_prompt": cache,
            "stream": True,
            "temperature": 0.0,
            "ignore_eos": True,
        }
        try:
            headers = {"Content-Type": "application/json"}
            request = Request(f"{self._url}/completion", json.dumps(body).encode(), headers)
            with urlopen(request, timeout=TIMEOUT_S) as reply:
                for line in reply:
                    if line.startswith(b"data: "):
                        yield _event(json.loads(line.removeprefix(b"data: ")))
        except (OSError, HTTPException, ValueError) as error:
            raise Unavailable(f"{self._url} does not answer as llama.cpp's server: {error}") from error


def _event(data: Any) -> dict[str, Any]:
    """Raises ValueError for what is no part of a completion."""
    if not isinstance(data, dict) or "error" in data:
        raise ValueError(f"it says {data}")
    return data
