"""What is asked while budgets are measured, and when: all of it drawn from one seed. Knows no clock and no daemon."""

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from iotd.client import AskOptions
from iotd.demo.devices import CAMERA
from iotd.demo.home import ROOMS
from iotd.demo.questions import KIND_WEIGHTS

Form = Literal["free", "choices", "json_schema", "regex"]

ROOM_SCHEMA = {
    "type": "object",
    "properties": {
        "room": {"enum": [*ROOMS]},
        "degrees": {"type": "integer", "minimum": -20, "maximum": 45},
        "note": {"type": "string", "maxLength": 24},
    },
    "required": ["room", "degrees", "note"],
    "additionalProperties": False,
}
SENTENCE_REGEX = r"[A-Z][a-z]{2,12}( [a-z]{2,12}){2,6}, [0-9]{1,3}( [a-z]{2,12}){0,3}\."
"""Means the same to Rust and to Python."""
YES_NO = ("Yes", "No")

FAST_STEP_S = 0.01
FAST_STEPS = 5.0, 500.0
"""Budgets of a model whose decode steps are shorter than that: in steps."""
BUDGETS_S = 0.2, 10.0
"""Budgets of all others."""

_CAMERA = tuple(kind for kind in KIND_WEIGHTS if kind.startswith("camera"))


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """One way to ask."""

    name: str
    weight: float
    """How often it is drawn."""
    subjects: tuple[str, ...]
    """Of the demo's repertoire."""
    forms: tuple[str, ...]
    plain: str
    """Asked where no answer about these subjects is settled: where readings come faster than they can be read."""
    max_tokens: tuple[int, int]
    """Drawn between these."""
    options: AskOptions = field(default_factory=AskOptions)
    judged: bool = False
    """Whether the answer can be right: it is in words that the demo's model knows, and there is room for all of it."""

    @property
    def form(self) -> Form:
        """What the answer has to keep to."""
        return next((form for form in ("choices", "json_schema", "regex") if form in self.options), "free")


KINDS = (
    Kind("short", 3.0, tuple(KIND_WEIGHTS), ("brief",), "Is a door open?", (8, 24), judged=True),
    Kind("sentence", 2.0, tuple(KIND_WEIGHTS), ("sentence",), "Is a door open?", (24, 64), judged=True),
    Kind("long", 2.0, ("value",), ("long",), "What goes on in the house?", (64, 128), judged=True),
    Kind(
        "choices",
        1.5,
        ("state", "any door", "any motion"),
        ("brief",),
        "Is a door open?",
        (8, 8),
        {"choices": YES_NO},
        judged=True,
    ),
    Kind(
        "schema",
        1.5,
        ("warmest", "coldest"),
        ("json",),
        "Which room is the warmest?",
        (64, 96),
        {"json_schema": json.dumps(ROOM_SCHEMA)},
    ),
    Kind(
        "regex",
        1.0,
        ("value", "state", "missing"),
        ("sentence",),
        "How warm is it in the kitchen?",
        (64, 96),
        {"regex": SENTENCE_REGEX},
    ),
    Kind("camera", 1.0, _CAMERA, ("sentence",), "What is at the door?", (64, 64), {"camera": CAMERA}, judged=True),
    Kind(
        "thinking",
        0.5,
        tuple(KIND_WEIGHTS),
        ("sentence",),
        "Which room is the warmest?",
        (64, 128),
        {"thinking": True},
    ),
)


def kinds(*, vision: bool, thinking: bool) -> tuple[Kind, ...]:
    """Those that a package can be asked."""
    return tuple(
        kind
        for kind in KINDS
        if (vision or "camera" not in kind.options) and (thinking or "thinking" not in kind.options)
    )


@dataclass(frozen=True, slots=True)
class Arrival:
    """One ask to come."""

    at_s: float
    """Since the beginning."""
    kind: Kind
    budget_s: float
    max_tokens: int
    seed: int
    """Of its question."""
    again: bool
    """Where it is refused, it is sent again with time enough, to see whether the refusal was right."""


def arrivals(
    rng: random.Random,
    rate_hz: float,
    budgets_s: tuple[float, float],
    mix: Sequence[Kind],
    *,
    again: float = 0.0,
) -> Iterator[Arrival]:
    """Endless: a Poisson process of asks, whose budgets are log-uniform. again: the share to be asked again."""
    low, high = map(math.log, budgets_s)
    at_s = 0.0
    while True:
        at_s += rng.expovariate(rate_hz)
        (kind,) = rng.choices(mix, [kind.weight for kind in mix])
        budget_s = math.exp(rng.uniform(low, high))
        yield Arrival(at_s, kind, budget_s, rng.randint(*kind.max_tokens), rng.getrandbits(32), rng.random() < again)


def budgets_for(step_s: float) -> tuple[float, float]:
    """The shortest and the longest budget for a model whose decode step takes so long."""
    if step_s >= FAST_STEP_S:
        return BUDGETS_S
    return FAST_STEPS[0] * step_s, FAST_STEPS[1] * step_s


def mean_service_s(took_s: Mapping[Kind, Sequence[float]], budgets_s: tuple[float, float]) -> float:
    """What an ask of the mix takes on average, at most its budget. took_s: by kind, of asks with time enough."""
    total = sum(
        kind.weight * sum(_within_budget_s(each, budgets_s) for each in times) / len(times)
        for kind, times in took_s.items()
    )
    return total / sum(kind.weight for kind in took_s)


def _within_budget_s(took_s: float, budgets_s: tuple[float, float]) -> float:
    """The mean of the smaller of took_s and a budget: the integral of min(took, b) / (b ln(high / low))."""
    low, high = budgets_s
    if took_s <= low or low == high:
        return min(took_s, low)
    top = min(took_s, high)
    return (top - low + took_s * math.log(high / top)) / math.log(high / low)
