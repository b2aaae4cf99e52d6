"""What the warm context is worth: how soon an answer begins over a short and over a long one, how soon two labels are
weighed, and what a fork costs.

It drives the engine that the daemon runs, without broker and network.
"""

import queue
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from iotd.config import AskConfig, ContextConfig
from iotd.engine import Engine
from iotd.errors import Unavailable
from iotd.events import AnswerEvent, Ask, Done, Failed, Labels, Reading, Sampling
from iotd.model import Model
from iotd.ops import board
from iotd.ops.bench import OURS, Figure, figure, in_turn
from iotd.ops.peers import LlamaServer

WINDOW = 2048
QUESTION_TOKENS = 20
LABELS = Labels(("Y", "N"))
"""Of one token each, whatever the vocabulary."""
WEIGHING = "iotd, labels"
N_FORKS = 100
CHART = "first token"
READ_S = 600.0
"""How long the context may take to be read."""


def run(
    package: Path, *, threads: int, repeat: int, lengths: tuple[int, ...], peers: Sequence[LlamaServer] = ()
) -> Iterator[Figure]:
    """Measure, figure by figure. lengths: tokens of context, ascending. peers: are asked over as many tokens, in turn.

    Raises PackageError where the package cannot be opened, Unavailable where a peer does not answer.
    """
    model = Model.open(package, threads=threads)
    engine = Engine(model, ContextConfig(window=WINDOW), AskConfig(session_bytes=0))
    question = _question(model)
    engine.start()
    try:
        n_read = 0
        medians: list[float] = []
        for length in lengths:
            n_read = _fill(engine, length, n_read)
            asks = {
                OURS: partial(_answered_s, engine, question),
                WEIGHING: partial(_answered_s, engine, question, LABELS),
            }
            asks |= {peer.name: partial(_PeerAsker(peer, model, length).first_token_s) for peer in peers}
            first_s = in_turn(asks, repeat)
            tokens = engine.status().context_tokens
            own = figure(f"first token over {tokens}", "s", first_s[OURS], chart=CHART, at=length)
            medians.append(own.median)
            yield own
            yield figure(f"two labels weighed over {tokens}", "s", first_s[WEIGHING], at=length)
            for name in [*asks][2:]:
                ratios = [b / a for a, b in zip(first_s[OURS], first_s[name], strict=True)]
                yield figure(f"the same, {name} over {length}", "s", first_s[name], engine=name, chart=CHART, at=length)
                yield figure(f"so many times sooner than {name}", "×", ratios)
        yield figure("the last against the first", "×", [medians[-1] / medians[0]])
    finally:
        engine.stop(0)
    yield from _forks(model, repeat)


class _PeerAsker:
    """Asks a peer one new question after another over the same tokens.

    Each prompt is those tokens and a question, as a client sends it that knows nothing of the server's cache. Who sends
    the tokens ahead without a question spares llama.cpp reading its last 516 again.
    """

    def __init__(self, peer: LlamaServer, model: Model, length: int) -> None:
        self._peer = peer
        self._rng = np.random.default_rng(length)
        self._vocab_size = model.spec.vocab_size
        self._context = self._ids(length)

    def first_token_s(self) -> float:
        return self._peer.first_token_s(self._context + self._ids(QUESTION_TOKENS))

    def _ids(self, n: int) -> list[int]:
        ids: list[int] = self._rng.integers(0, self._vocab_size, n).tolist()
        return ids


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


def _answered_s(engine: Engine, question: str, labels: Labels | None = None) -> float:
    """Until the first token, or until the labels are weighed."""
    events: queue.SimpleQueue[AnswerEvent] = queue.SimpleQueue()
    now_s = time.monotonic()
    # An answer of one token, so that its end is its beginning: random weights may draw half of a character.
    sampling = Sampling(max_tokens=1, temperature=0.0)
    engine.submit(Ask(question, now_s, now_s + READ_S, sampling=sampling, labels=labels), events.put)
    while not isinstance(event := events.get(), Done):
        if isinstance(event, Failed):
            raise event.error
    return time.monotonic() - now_s


def _question(model: Model) -> str:
    text = "what"
    while len(model.tokenizer.encode(text, special=False)) < QUESTION_TOKENS:
        text += " now"
    return text


def _forks(model: Model, repeat: int) -> Iterator[Figure]:
    """What one costs, and how much memory a hundred leave behind."""
    state, fork = model.new_state(WINDOW + 64), model.new_state(0)
    for _ in range(WINDOW // 128):
        model.prefill(state, [1] * 128, logits=False)

    def lend() -> float:
        began_s = time.perf_counter()
        state.lend_to(fork)
        took_ms = 1e3 * (time.perf_counter() - began_s)
        model.prefill(fork, [1], logits=False)
        return took_ms

    lend()
    before = board.anonymous_nbytes()
    took_ms = [lend() for _ in range(max(N_FORKS, repeat))]
    left_mb = (board.anonymous_nbytes() - before) / 1e6
    yield figure(f"fork of {WINDOW}", "ms", took_ms)
    yield figure(f"left behind by {len(took_ms)} forks", "MB", [left_mb])
