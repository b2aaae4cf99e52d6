"""Long runs: what must not grow. Minutes each, so they are marked heavy.

`IOTD_SOAK_PACKAGE=FOLDER pytest -m heavy tests/test_soak.py` runs them on that package instead of a tiny one.
"""

import os
import queue
import sys
import time
from pathlib import Path
from statistics import median

import pytest
from patience import PATIENCE_S

from iotd.config import AskConfig, ContextConfig
from iotd.engine import Engine
from iotd.events import AnswerEvent, Ask, Done, Failed, Reading, Sampling
from iotd.model import Model
from iotd.ops import board

pytestmark = pytest.mark.heavy

FIRST, LAST = 4_000, int(os.environ.get("IOTD_SOAK_TOKENS", "200000"))
"""By the first, the window has been full and its successor has taken over."""
ALLOWED_NBYTES = 2_000_000
ASK_EVERY = 1_000
"""Tokens."""


@pytest.fixture
def package(tiny_int4_package: Path) -> Path:
    return Path(os.environ.get("IOTD_SOAK_PACKAGE") or tiny_int4_package)


def test_memory_is_constant_and_no_ask_waits_for_a_swap(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over 200,000 tokens (IOTD_SOAK_TOKENS) with an ask every 1,000, while successors are being built too."""
    engine = Engine(Model.open(package), ContextConfig(window=2048), AskConfig())
    engine.start()
    try:
        first, _ = _stream(engine, FIRST)
        last, waits_s = _stream(engine, LAST)
        swaps = engine.status().counters["context_swaps"]
    finally:
        engine.stop()
    with capsys.disabled():
        text = f"resident {first / 1e6:.2f} MB after {FIRST} tokens, {last / 1e6:.2f} after {LAST}; {swaps} swaps; "
        text += f"{len(waits_s)} asks in the queue for {1e3 * median(waits_s):.1f} ms, {1e3 * max(waits_s):.1f} at most"
        sys.stdout.write(f"\n  {text}\n")
    assert abs(last - first) <= ALLOWED_NBYTES


def _stream(engine: Engine, n_tokens: int) -> tuple[int, list[float]]:
    """Feed readings as fast as they are read, until that many tokens went in, with asks in between.

    Returns resident bytes, and how long each ask waited in the queue.
    """
    n = 0
    waits_s: list[float] = []
    next_ask = engine.status().counters["context_tokens_read"] + ASK_EVERY
    while (status := engine.status()).counters["context_tokens_read"] < n_tokens:
        if status.counters["context_tokens_read"] >= next_ask:
            next_ask += ASK_EVERY
            waits_s.append(_ask(engine))
        elif status.backlog < 8:
            n += 1
            engine.observe(Reading(f"room {n % 7} temperature", f"{20 + n % 50 / 10:.1f} °C", time.time()))
        else:
            time.sleep(0.001)  # nothing to wait for but the engine's own pace
    return board.resident_nbytes(), waits_s


def _ask(engine: Engine) -> float:
    """Seconds in the queue."""
    events: queue.SimpleQueue[AnswerEvent] = queue.SimpleQueue()
    now_s = time.monotonic()
    engine.submit(Ask("Which room is the warmest?", now_s, now_s + 60, sampling=Sampling(max_tokens=2)), events.put)
    while not isinstance(event := events.get(timeout=PATIENCE_S), Done):
        assert not isinstance(event, Failed), event
    return event.timings.queue_s
