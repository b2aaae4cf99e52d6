"""Which operators the time of a run goes to, in reading and in decoding, as onnxruntime's own profile has it."""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from iotd.model import Model
from iotd.ops.bench import token_ids

PREFILL_TOKENS = 128
RUNS = 16
CONTEXT_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Share:
    """One kind of operator, in one kind of run."""

    what: str
    """`decode` or `prefill 128`."""
    operator: str
    nodes: int
    """Of this kind in the graph."""
    mean_ms: float
    """All of them in one run."""
    part: float
    """Of the time that all operators take."""


def run(package: Path, *, threads: int) -> Iterator[Share]:
    """Profile the decoder, without packed weights. Raises PackageError where it cannot be opened."""
    for what, n_tokens in (("decode", 1), (f"prefill {PREFILL_TOKENS}", PREFILL_TOKENS)):
        with TemporaryDirectory() as folder:
            model = Model.open(package, threads=threads, profile=Path(folder) / "profile")
            state = model.new_state(CONTEXT_TOKENS + (RUNS + 1) * n_tokens)
            model.prefill(state, token_ids(model, CONTEXT_TOKENS), logits=False)
            for ids in token_ids(model, RUNS * n_tokens).reshape(RUNS, n_tokens):
                model.prefill(state, ids)
            events = json.loads(model.end_profile().read_text())
        yield from _shares(what, events)


def _shares(what: str, events: list[dict[str, Any]]) -> list[Share]:
    """Of the last RUNS runs, the operator that takes longest first."""
    runs = sorted((e for e in events if e["name"] == "model_run"), key=lambda e: e["ts"])[-RUNS:]
    begin = runs[0]["ts"]
    spent: dict[str, float] = defaultdict(float)
    nodes: dict[str, set[str]] = defaultdict(set)
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= begin:
            operator = event["args"]["op_name"]
            spent[operator] += event["dur"] / 1e3
            nodes[operator].add(event["name"])
    total = sum(spent.values())
    shares = [Share(what, name, len(nodes[name]), ms / len(runs), ms / total) for name, ms in spent.items()]
    return sorted(shares, key=lambda share: -share.mean_ms)
