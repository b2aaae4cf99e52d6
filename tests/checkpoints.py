"""Small checkpoints on disk, made by changing those of tests/golden."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16  # registers the type, without which safetensors cannot read it into numpy
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).parent / "golden"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BFLOAT16 = np.dtype(bfloat16)
Tensors = dict[str, NDArray[Any]]


def copy_checkpoint(folder: Path, name: str = "grouped") -> Path:
    """A copy that a test may change; `grouped` is tied, `untied` is not."""
    return copy_files(GOLDEN / name, folder, but="expected.npz")


def copy_files(source: Path, folder: Path, *, but: str) -> Path:
    """A copy of a folder without one of its files."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(but))
    return folder


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def edit_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Rewrite the single weight file."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def shard(folder: Path, count: int = 3) -> list[Path]:
    """Replace the single weight file by shards and their index, as save_pretrained writes them."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(tensors)
    files = [folder / f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    weight_map = {}
    for i, file in enumerate(files):
        mine = names[i::count]
        save_file({name: tensors[name] for name in mine}, file)
        weight_map |= dict.fromkeys(mine, file.name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


def text_only(folder: Path) -> None:
    """Name everything as Qwen3_5ForCausalLM does, and drop the vision tower."""

    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            values = tensors.pop(name)
            if not name.startswith("model.visual."):
                tensors[name.replace("model.language_model.", "model.")] = values

    def flatten(config: dict[str, Any]) -> None:
        text = config.pop("text_config")
        config.clear()
        config.update(text, architectures=["Qwen3_5ForCausalLM"])

    edit_tensors(folder, rename)
    edit_json(folder / "config.json", flatten)


def truncate(path: Path, part: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
