"""What is saved where an answer's words are known beforehand: quoted from the context, or forced by a schema.

Random weights quote nothing: the words of the first kind of answer are given, and the runs that they take measured.
"""

import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from iotd.events import Format, Sampling
from iotd.model import Model, State
from iotd.model.generation import Generation
from iotd.ops.bench import OURS, Figure, figure, in_turn
from iotd.ops.peers import LlamaServer

CONTEXT_TOKENS = 400
QUOTED_TOKENS = 96
MAX_TOKENS = 512
ROOMS = ("kitchen", "hall", "attic", "cellar")
SCHEMA = {
    "type": "object",
    "properties": {
        room: {
            "type": "object",
            "properties": {
                "temperature": {"type": "integer", "minimum": -20, "maximum": 45},
                "window": {"enum": ["open", "closed", "unknown"]},
                "occupied": {"type": "boolean"},
            },
            "required": ["temperature", "window", "occupied"],
            "additionalProperties": False,
        }
        for room in ROOMS
    },
    "required": list(ROOMS),
    "additionalProperties": False,
}


def run(package: Path, *, threads: int, repeat: int, peers: Sequence[LlamaServer] = ()) -> Iterator[Figure]:
    """Measure, figure by figure. peers: write under the same schema, in turn.

    Raises PackageError where the package cannot be opened, Unavailable where a peer does not answer.
    """
    model = Model.open(package, threads=threads)
    ids = model.tokenizer.encode("".join(map(_line, range(64))))[:CONTEXT_TOKENS]
    base, state = model.new_state(CONTEXT_TOKENS), model.new_state(CONTEXT_TOKENS + MAX_TOKENS)
    model.prefill(base, ids, logits=False)
    quote = ids[CONTEXT_TOKENS // 2 :][:QUOTED_TOKENS]

    def quoted(said: list[int] | None) -> float:
        base.copy_into(state)
        return _quoted(model, state, quote, said)

    speeds = in_turn({"word by word": partial(quoted, None), "guessed": partial(quoted, ids)}, repeat)
    for how, own in speeds.items():
        yield figure(f"quoting, {how}", "tokens/s", own)
    yield figure("so many times faster", "×", [b / a for a, b in zip(*speeds.values(), strict=True)])
    yield from _schema(model, base, state, ids, repeat, peers)


def _schema(
    model: Model, base: State, state: State, ids: list[int], repeat: int, peers: Sequence[LlamaServer]
) -> Iterator[Figure]:
    def ours() -> float:
        base.copy_into(state)
        return _written(model, state, ids[-1])

    writers = {OURS: ours} | {peer.name: partial(peer.json_speed, ids, SCHEMA, MAX_TOKENS) for peer in peers}
    speeds = in_turn(writers, repeat)
    for name, own in speeds.items():
        yield figure(f"JSON under a schema, {name}", "characters/s", own, engine=name)
    for name in [*writers][1:]:
        ratios = [a / b for a, b in zip(speeds[OURS], speeds[name], strict=True)]
        yield figure(f"so many times faster than {name}", "×", ratios)


def _quoted(model: Model, state: State, quote: list[int], said: list[int] | None) -> float:
    logits = model.step(state, quote[0]).copy()
    generation = model.generation(state, logits, Sampling(temperature=0.0, max_tokens=len(quote)), said=said)
    generation._sampler = _Given(quote)  # type: ignore[assignment]
    return len(quote) / _finished(generation)[1]


def _written(model: Model, state: State, last: int) -> float:
    constraint = model.constraint(Format("json_schema", (json.dumps(SCHEMA),)), MAX_TOKENS)
    logits = model.prefill(state, [last], only=constraint.allowed())
    sampling = Sampling(temperature=0.0, max_tokens=MAX_TOKENS)
    generation = model.generation(state, logits, sampling, constraint=constraint)
    text, took_s = _finished(generation)
    return len(text) / took_s


def _finished(generation: Generation) -> tuple[str, float]:
    """Its text, and the seconds that it took."""
    text, began_s = "", time.perf_counter()
    while not generation.done:
        text += generation.step().answer
    return text, time.perf_counter() - began_s


class _Given:
    """Draws what is given, whatever the model would say."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = iter(tokens)

    def draw(self, logits: object) -> int:
        return next(self._tokens)


def _line(n: int) -> str:
    return f"[14:{n // 60:02}:{n % 60:02}] {ROOMS[n % 4]} temperature {15 + n * 37 % 100 / 10:.1f} °C\n"
