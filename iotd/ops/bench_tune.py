"""Which compute threads serve this machine best: how many, whether they spin, whether they keep to their cores.

Every setting is opened anew for each of its turns, so that no other's threads or weights stand beside it.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from iotd.model import Model
from iotd.ops import board
from iotd.ops.bench import Ours, token_ids
from iotd.ops.peers import Speeds

LOSS = 0.05
"""Of the fastest decode: as much is given for what is better in other ways."""
TOKENS, STEPS = 128, 48
MOST_THREADS = 8
"""Beyond, no more weights a second come from memory, and trying takes long."""


@dataclass(frozen=True, slots=True)
class Setting:
    """The keys of the configuration's `model` that it would set."""

    threads: int
    spinning: bool
    affinity: bool


@dataclass(frozen=True, slots=True)
class Tried:
    """A setting, and the medians of what it reaches."""

    setting: Setting
    speeds: Speeds


def settings(cores: int) -> list[Setting]:
    """All that differ: one thread alone has none beside it that could spin or be kept."""
    pairs = [(spinning, affinity) for spinning in (False, True) for affinity in (False, True)]
    return [
        Setting(1, False, False),
        *(Setting(n, *pair) for n in range(2, min(cores, MOST_THREADS) + 1) for pair in pairs),
    ]


def run(package: Path, *, repeat: int, advance: Callable[[int], None] = lambda _: None) -> list[Tried]:
    """Try all settings in turn, so many times over. advance: told of each turn that is done.

    Raises PackageError where the package cannot be opened.
    """
    found: dict[Setting, list[Speeds]] = {setting: [] for setting in settings(board.cores())}
    for _ in range(repeat):
        for setting, speeds in found.items():
            speeds.append(_speeds(package, setting))
            advance(1)
    return [Tried(setting, _median(speeds)) for setting, speeds in found.items()]


def _speeds(package: Path, setting: Setting) -> Speeds:
    model = Model.open(package, threads=setting.threads, spinning=setting.spinning, affinity=setting.affinity)
    ids = token_ids(model, TOKENS)
    ours = Ours(model, model.new_state(TOKENS + STEPS))
    ours.speeds(ids.tolist(), 1)  # warms
    return ours.speeds(ids.tolist(), STEPS)


def _median(found: Sequence[Speeds]) -> Speeds:
    return Speeds(*(statistics.median(getattr(speeds, what) for speeds in found) for what in ("prefill", "decode")))


def choose(tried: Sequence[Tried], cores: int) -> Setting:
    """Of those that decode nearly as fast as the fastest, one that leaves a core to the daemon and to others, that does
    not spin, that lets the kernel place its threads: in this order, each where there is one. The fastest to read, then.
    """
    fastest = max(t.speeds.decode for t in tried)
    left = [t for t in tried if t.speeds.decode >= (1 - LOSS) * fastest]
    left = [t for t in left if t.setting.threads < cores] or left
    left = [t for t in left if not t.setting.spinning] or left
    left = [t for t in left if not t.setting.affinity] or left
    return max(left, key=lambda t: t.speeds.prefill).setting
