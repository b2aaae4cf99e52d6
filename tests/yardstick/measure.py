"""Measures recipes on one model: the float32 stack once, then the stack as each recipe has it, on the same texts."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from yardstick.figures import Distances, distances, joined, summary
from yardstick.recipes import RECIPES
from yardstick.run import Variant
from yardstick.sources import Source, find_model
from yardstick.stacks import open_stack
from yardstick.texts import Text, cut
from yardstick.tokens import first_tokens, open_tokenizer

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
FIRST = 8
"""Positions that are left out: what follows so few tokens is anybody's guess."""
ROWS = 64
"""Positions whose logits are in memory at a time: 67 MB each for 262,144 tokens."""


class Report(TypedDict):
    """What is measured of one recipe."""

    bits: float
    texts: list[dict[str, float | str]]
    head: dict[str, float] | None


def measure(
    model: str, recipes: Sequence[str], texts: Sequence[Text], most: int | None, seed: int, work: Path
) -> Iterator[Report]:
    """Of each recipe, one after the other. most: tokens of each text. Raises MissingModel."""
    source = Source(find_model(model, work), work, seed)
    stack, tokenizer = open_stack(source), open_tokenizer(source)
    sequences = [cut(text.text, tokenizer, first_tokens(source), most) for text in texts]
    flat = [ids for of_text in sequences for ids in of_text]
    reference = Variant(stack, RECIPES["fp32"](stack), _folder(work, "float"))
    expected = reference.hidden(flat)
    for name in recipes:
        variant = Variant(stack, RECIPES[name](stack), _folder(work, name))
        parts = [*_compare(reference, variant, expected, flat)]
        figures = []
        for text, of_text in zip(texts, sequences, strict=True):
            mine, parts = parts[: len(of_text)], parts[len(of_text) :]
            figures.append({"kind": text.kind, **summary(joined(mine))})
        yield Report(bits=variant.bits, texts=figures, head=None)


def _folder(work: Path, name: str) -> Path:
    folder = work / name
    folder.mkdir(exist_ok=True)
    return folder


def _compare(
    reference: Variant, variant: Variant, expected: Sequence[Floats], sequences: Sequence[Ints]
) -> Iterator[Distances]:
    for ids, state, found in zip(sequences, expected, variant.hidden(sequences), strict=True):
        starts = range(FIRST, len(ids) - 1, ROWS)
        rows = [slice(start, min(start + ROWS, len(ids) - 1)) for start in starts]
        yield joined(
            [
                distances(reference.logits(state[part]), variant.logits(found[part]), ids[part.start + 1 : part.stop + 1])
                for part in rows
            ]
        )
