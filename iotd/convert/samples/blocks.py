"""Reads the data files beside this module: blocks of text, each behind a line `=== WORDS`."""

from collections.abc import Iterator
from importlib.resources import files
from typing import Literal

Part = Literal["fit", "held"]
LANGUAGES = ("de", "fr", "es", "it", "nl", "pt", "pl", "ru", "zh", "ja")
"""Beside English, of which most of the texts are."""

_HEAD = "=== "


def read_blocks(part: Part, name: str) -> list[tuple[list[str], str]]:
    """The words of each block's head, and its text without blank lines around it."""
    return [*_blocks((files(__package__) / part / f"{name}.txt").read_text("utf-8"))]


def _blocks(text: str) -> Iterator[tuple[list[str], str]]:
    for block in f"\n{text}".split(f"\n{_HEAD}")[1:]:
        head, _, body = block.partition("\n")
        yield head.split(), body.strip("\n")
