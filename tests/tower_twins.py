"""Twins of a checkpoint whose vision tower has the outlier channels of a large one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from checkpoints import SINGLE, copy_files
from ml_dtypes import bfloat16  # noqa: F401 - registers the type, without which safetensors cannot read it into numpy
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

Doubles = NDArray[np.float64]
Tower = dict[str, Doubles]
"""Tensors by what follows `visual.` in their names."""
SIZES = np.array([100.0, 100.0, 1000.0, 1000.0])
"""Of four channels, how many times as large as the others they are to be."""
READERS = {"norm1": "attn.qkv", "norm2": "mlp.linear_fc1", "merger.norm": "merger.linear_fc1"}


def twin(source: Path, out: Path, change: Callable[[Tower], None]) -> Path:
    """Write a checkpoint with a single weight file and another tower to a new folder, and return that folder."""
    stored = load_file(source / SINGLE)
    names = {name.partition("visual.")[2]: name for name in stored if "visual." in name}
    tower = {short: stored[name].astype(np.float64) for short, name in names.items()}
    change(tower)
    copy_files(source, out, but=SINGLE)
    save_file(stored | {name: tower[short].astype(np.float32) for short, name in names.items()}, out / SINGLE)
    return out


def stretch(tower: Tower) -> None:
    """Stretch four channels of every norm's output and of every block's values; what reads them takes it back.

    The tower computes what it computed.
    """
    random = np.random.default_rng(0)
    for name in [name.removesuffix(".weight") for name in tower if "norm" in name and name.endswith(".weight")]:
        norm = "merger.norm" if name == "merger.norm" else name.rpartition(".")[2]
        factors = _factors(random, len(tower[f"{name}.weight"]))
        tower[f"{name}.weight"] *= factors
        tower[f"{name}.bias"] *= factors
        reader = tower[f"{name.removesuffix(norm)}{READERS[norm]}.weight"]
        reader /= np.tile(factors, reader.shape[1] // len(factors))  # the merger's has the channels of four patches
    for name in [name.removesuffix("qkv.weight") for name in tower if name.endswith("qkv.weight")]:
        size = len(tower[f"{name}proj.bias"])
        factors = _factors(random, size)
        tower[f"{name}qkv.weight"][-size:] *= factors[:, None]
        tower[f"{name}qkv.bias"][-size:] *= factors
        tower[f"{name}proj.weight"] /= factors


def swell(tower: Tower) -> None:
    """Make four channels of the residual massive, two in all tokens and two at one corner, and four units of each MLP.

    The positions bring them in: so many times as large as a position's other channels. The norms take them back to
    the size of the rest, and magnify the rest by what the two that are everywhere make it smaller, as a model that has
    such channels does. A unit's activation is all but linear where it is large, and it is read by a smaller column. The
    tower computes something else than before: compare only what is made of this one.
    """
    random = np.random.default_rng(0)
    table = tower["pos_embed.weight"]
    side, width = int(len(table) ** 0.5), table.shape[1]
    channels = random.choice(width, 4, replace=False)
    massive = SIZES * np.sqrt(np.square(table).mean())
    table[:, channels[::2]] += massive[::2]
    table.reshape(side, side, width)[: side // 3, : side // 3, channels[1::2]] -= massive[1::2]
    factors = np.full(width, np.sqrt(1 + np.square(SIZES[::2]).sum() / width))
    factors[channels] = 1 / np.sqrt(width)
    for name in [name for name in tower if "norm" in name and name.endswith(".weight")]:
        tower[name] *= factors
    for name in [name.removesuffix("1.weight") for name in tower if name.endswith("linear_fc1.weight")]:
        factors = _factors(random, len(tower[f"{name}1.bias"]))
        tower[f"{name}1.weight"] *= factors[:, None]
        tower[f"{name}1.bias"] *= factors
        tower[f"{name}2.weight"] /= factors


def _factors(random: np.random.Generator, n: int) -> Doubles:
    factors = np.ones(n)
    factors[random.choice(n, len(SIZES), replace=False)] = SIZES
    return factors
