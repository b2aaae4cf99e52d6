"""Measures recipes on one model: the float32 stack once, then the stack as each recipe has it, on the same texts."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import msgspec

from iotd.convert.layers import FLOAT, Layers
from iotd.convert.quality import by_kind, compare, float_logits
from yardstick.heads import HeadFigures, StoredHead
from yardstick.recipes import recipes
from yardstick.sources import Source, find_model
from yardstick.stacks import open_stack
from yardstick.texts import Text, cut
from yardstick.tokens import Calibrating, open_tokenizer


class Report(TypedDict):
    """What is measured of one recipe."""

    bits: float
    texts: list[dict[str, float | str]]
    head: HeadFigures


def measure(
    model: str, names: Sequence[str], texts: Sequence[Text], most: int | None, seed: int, work: Path
) -> Iterator[Report]:
    """Of each recipe, one after the other. most: tokens of each text. Raises MissingModel."""
    source = Source(find_model(model, work), work, seed)
    tokenizer = Calibrating.of(source, open_tokenizer(source))
    sequences = [(text.kind, ids) for text in texts for ids in cut(tokenizer.encode(text.text)[:most], tokenizer.first)]
    ids = [each for _, each in sequences]
    reference = open_stack(source)
    expected = Layers(reference, ids, work).hidden(FLOAT)
    for name in names:
        folder = work / name
        folder.mkdir()
        rounded = recipes()[name](source, tokenizer, ids, folder)
        head = StoredHead(rounded.stack.embedding(), rounded.rounding, rounded.calibrated, folder)
        both = float_logits(reference.embedding()), head.logits
        parts = compare(sequences, expected, rounded.hidden, *both)
        figures = [msgspec.to_builtins(each) for each in by_kind(parts)]
        yield Report(bits=rounded.bits, texts=figures, head=head.figures(rounded.hidden))
