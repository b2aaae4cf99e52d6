"""The user's own lines, as the context has them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from iotd.errors import InvalidInput
from iotd.model.tokenizer import Tokenizer

_CHARS_PER_TOKEN = 16
"""Of a line, more characters than this for each token of a sequence are not even tokenised."""
_HELD_EVERY = 5
"""The last of so many lines are held back."""


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank. Raises InvalidInput where it cannot be read, or has none."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise InvalidInput(f"{path} is not UTF-8: {found}", field="calibration") from error
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}", field="calibration") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise InvalidInput(f"{path} is empty: lines as the context has them are needed", field="calibration")
    return lines


def split(lines: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """What is fitted to, and what is held back: the last fifth."""
    at = len(lines) - len(lines) // _HELD_EVERY
    return lines[:at], lines[at:]


def windows(
    lines: Sequence[str], tokenizer: Tokenizer, opening: list[int], *, n_sequences: int, length: int
) -> Iterator[list[int]]:
    """At most so many sequences of `length` tokens, spread over all lines, none of which is used twice.

    Raises InvalidInput where the lines are too few for one.
    """
    at = 0
    for i in range(n_sequences):
        at = max(at, i * len(lines) // n_sequences)
        ids = [*opening]
        while len(ids) < length and at < len(lines):
            ids += tokenizer.encode(f"{lines[at][: length * _CHARS_PER_TOKEN]}\n")
            at += 1
        if len(ids) >= length:
            yield ids[:length]
        elif i == 0:
            raise InvalidInput(
                f"too few lines to calibrate with: {len(lines)} of them make {len(ids) - len(opening)} tokens, and a "
                f"sequence takes {length - len(opening)}; the last fifth of all lines, held back, has to make one, too",
                field="calibration",
            )
