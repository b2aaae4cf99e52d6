"""A context as plain data: its states' arrays, and the events its next successor is built from. Knows no disk.

The key says what a snapshot may be restored into: the same model, window and system prompt. All of it is checked before
anything is changed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from iotd.engine.entry import Entry, Image, Part, count_tokens
from iotd.errors import SnapshotError
from iotd.model.state import State

FORMAT = 1
Arrays = dict[str, NDArray[np.float32]]
Count = Annotated[int, msgspec.Meta(ge=0)]


class Key(msgspec.Struct, frozen=True):
    """What a context depends on, besides its events."""

    model: str
    """Fingerprint of the model package."""
    window: int
    system: str


class StateHeader(msgspec.Struct, frozen=True):
    position: Count
    rope_position: Count


class ImageHeader(msgspec.Struct, frozen=True):
    """An image of the stream; its embedding is the array of that name."""

    array: str
    size: tuple[int, int]
    grid: tuple[int, int, int]


class EntryHeader(msgspec.Struct, frozen=True):
    time_s: float
    day: str
    parts: list[list[Count] | ImageHeader]


class SessionHeader(msgspec.Struct, frozen=True):
    """A conversation; its state's arrays have its name."""

    name: str
    state: StateHeader
    unread: list[Count]
    behind: Count
    """Events that the context had read since it was last seen."""


class Header(msgspec.Struct, frozen=True):
    """Everything of a snapshot but its arrays."""

    format: int
    key: Key
    blank: StateHeader
    live: StateHeader
    oldest_s: float
    """Unix time of the oldest event in the context; 0 where it holds none."""
    day: str
    entries: list[EntryHeader]
    sessions: list[SessionHeader] = []
    """The one unused for longest first. Only the last of a daemon has any: they change while one is written."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One moment of a context. The arrays are views: whoever keeps them longer has to copy them."""

    header: Header
    arrays: Mapping[str, NDArray[np.float32]]


def pack_state(name: str, state: State, arrays: Arrays) -> StateHeader:
    """Add a state's arrays under its name."""
    arrays.update({f"{name}/{key}": array for key, array in state.arrays().items()})
    return StateHeader(state.position, state.rope_position)


def unpack_state(name: str, header: StateHeader, arrays: Mapping[str, NDArray[np.float32]], state: State) -> None:
    """Raises StateMismatch where the arrays are not of such a state."""
    own = {key.removeprefix(f"{name}/"): array for key, array in arrays.items() if key.startswith(f"{name}/")}
    state.load(own, header.position, header.rope_position)


def pack_entries(entries: Iterable[Entry], arrays: Arrays) -> list[EntryHeader]:
    """Describe entries that have been read; the embeddings of their images are added to the arrays."""
    return [EntryHeader(entry.time_s, entry.day, [_packed(part, arrays) for part in entry.parts]) for entry in entries]


def unpack_entries(headers: Iterable[EntryHeader], arrays: Mapping[str, NDArray[np.float32]]) -> list[Entry]:
    """Raises SnapshotError where an embedding is missing or of another size."""
    entries = []
    for header in headers:
        parts = tuple(_unpacked(part, arrays) for part in header.parts)
        entries.append(Entry(parts, header.time_s, header.day, count_tokens(parts)))
    return entries


def _packed(part: Part, arrays: Arrays) -> list[int] | ImageHeader:
    if not isinstance(part, Image):
        return part
    assert part.embedding is not None
    name = f"image/{len(arrays)}"
    arrays[name] = part.embedding
    return ImageHeader(name, part.size, part.grid)


def _unpacked(part: list[int] | ImageHeader, arrays: Mapping[str, NDArray[np.float32]]) -> Part:
    if not isinstance(part, ImageHeader):
        return part
    embedding = arrays.get(part.array)
    if embedding is None or embedding.ndim != 2 or embedding.dtype != np.float32:
        raise SnapshotError(f"the image {part.array} of the snapshot is missing or damaged")
    return Image(None, part.size, part.grid, len(embedding), embedding)
