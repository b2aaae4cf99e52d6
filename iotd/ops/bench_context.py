"""What the warm context is worth: how soon an answer begins over a short and over a long one, and what a fork costs.

It drives the engine that the daemon runs, without broker and network.
"""

import queue
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from iotd.config import AskConfig, ContextConfig
from iotd.engine import Engine
from iotd.errors import Unavailable
from iotd.events import AnswerEvent, Ask, Done, Failed, Reading, Sampling
from iotd.model import Model
from iotd.ops.bench import Figure

WINDOW = 2048
QUESTION_TOKENS = 20
READ_S = 600.0
"""How long the context may take to be read."""


def run(package: Path, *, threads: int, repeat: int, lengths: tuple[int, ...]) -> Iterator[Figure]:
    """Measure, figure by figure. lengths: tokens of context, ascending. Raises PackageError or Unavailable."""
    model = Model.open(package, threads=threads)
    engine = Engine(model, ContextConfig(window=WINDOW), AskConfig(session_bytes=0))
    question = _question(model)
    engine.start()
    try:
        n_read = 0
        medians: list[float] = []
        for length in lengths:
            n_read = _fill(engine, length, n_read)
            first_s = [_first_token_s(engine, question) for _ in range(repeat + 1)][1:]
            medians.append(statistics.median(first_s))
            tokens = engine.status().context_tokens
            yield Figure(f"first token over {tokens}", "s", medians[-1], min(first_s), max(first_s))
        ratio = medians[-1] / medians[0]
        yield Figure("the last against the first", "×", ratio, ratio, ratio)
    finally:
        engine.stop(0)
    yield _fork(model, repeat)


def _fill(engine: Engine, length: int, n_read: int) -> int:
    """Read sensors until the context has about so many tokens. Returns how many readings there are by then."""
    end_s = time.monotonic() + READ_S
    tokens, line_tokens = engine.status().context_tokens, 0
    while tokens + line_tokens <= length:
        n_read += 1
        value = f"{15 + n_read * 37 % 100 / 10:.1f} °C"
        engine.observe(Reading(f"room {n_read % 12} temperature", value, 1.76e9 + 5 * n_read))
        while (now := engine.status().context_tokens) == tokens:
            if time.monotonic() > end_s:
                raise Unavailable(f"the context has {tokens} tokens after {READ_S:g} s, {length} are wanted")
            time.sleep(0.001)
        tokens, line_tokens = now, now - tokens
    return n_read


def _first_token_s(engine: Engine, question: str) -> float:
    events: queue.SimpleQueue[AnswerEvent] = queue.SimpleQueue()
    now_s = time.monotonic()
    # An answer of one token, so that its end is its beginning: random weights may draw half of a character.
    engine.submit(Ask(question, now_s, now_s + READ_S, sampling=Sampling(max_tokens=1, temperature=0.0)), events.put)
    while not isinstance(event := events.get(), Done):
        if isinstance(event, Failed):
            raise event.error
    return time.monotonic() - now_s


def _question(model: Model) -> str:
    text = "what"
    while len(model.tokenizer.encode(text, special=False)) < QUESTION_TOKENS:
        text += " now"
    return text


def _fork(model: Model, repeat: int) -> Figure:
    state, fork = model.new_state(WINDOW + 64), model.new_state(0)
    for _ in range(WINDOW // 128):
        model.prefill(state, [1] * 128, logits=False)
    took_ms = []
    for _ in range(10 * repeat):
        began_s = time.perf_counter()
        state.lend_to(fork)
        took_ms.append(1e3 * (time.perf_counter() - began_s))
    return Figure(f"fork of {WINDOW}", "ms", statistics.median(took_ms), min(took_ms), max(took_ms))
