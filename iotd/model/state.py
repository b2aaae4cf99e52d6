"""The memory of one sequence: DeltaNet states, convolution tails and a key/value cache of fixed capacity.

Allocated once; copied, reset and handed to the decoder, which advances it in place. Knows nothing of tokens.
"""

import math
import mmap
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from iotd.errors import InvalidInput, StateMismatch
from iotd.model.spec import ModelSpec

Floats = NDArray[np.float32]


class Cache:
    """Rows of keys and values, one for each position: written by the state that owns them, or by a fork it lends to."""

    def __init__(self, spec: ModelSpec, capacity: int) -> None:
        self.capacity = capacity
        shapes = {name: shape for name, shape in spec.state_shapes(capacity).items() if _is_cache(name)}
        self.pages = _Pages(shapes)
        self.tensors = self.pages.tensors
        self.borrower: State | None = None
        """Who may write past the owner's position, until the owner itself reads on."""


class State:
    """Everything a model remembers of what it has read. It belongs to the model whose `spec`, that very object, it has.

    `position` counts the tokens read; `rope_position` is the rotary position of the next one, which lags behind where
    an image took fewer positions than tokens. A state of capacity 0 is a fork: it has no rows of its own, and works in
    those of the state that lends to it.
    """

    def __init__(self, spec: ModelSpec, capacity: int) -> None:
        """Raises InvalidInput for a capacity that the model has no positions for."""
        if not 0 <= capacity <= spec.max_positions:
            raise InvalidInput(
                f"a state's capacity is 0 to {spec.max_positions} tokens, not {capacity}", field="capacity"
            )
        self.spec = spec
        self.position = 0
        self.rope_position = 0
        self._pages = _Pages({name: shape for name, shape in spec.state_shapes(0).items() if not _is_cache(name)})
        self._recurrent = self._pages.tensors
        self._own = self._cache = Cache(spec, capacity)

    @property
    def tensors(self) -> Mapping[str, Floats]:
        """The buffers the decoder works in, by name; their addresses change only with `cache`."""
        return {**self._recurrent, **self._cache.tensors}

    @property
    def cache(self) -> Cache:
        """The rows it works in, its own or lent."""
        return self._cache

    @property
    def capacity(self) -> int:
        return self._cache.capacity

    @property
    def nbytes(self) -> int:
        """Bytes reserved from the start, of which those count that were written; lent rows are the lender's."""
        return sum(tensor.nbytes for tensor in (*self._recurrent.values(), *self._own.tensors.values()))

    @property
    def available(self) -> int:
        """Tokens that can still be read."""
        return self.capacity - self.position

    def reset(self) -> None:
        """Forget everything, and give the memory back until it is written again."""
        self._pages.clear()
        self._own.pages.clear()
        self._cache = self._own
        self.position = 0
        self.rope_position = 0

    def skip(self, n_tokens: int) -> None:
        """Pass over positions that nothing was read into: for measuring, as what follows has no meaning then."""
        self.position += n_tokens
        self.rope_position += n_tokens

    def copy(self) -> "State":
        """A new state of the same capacity that continues from here."""
        other = State(self.spec, self.capacity)
        self.copy_into(other)
        return other

    def copy_into(self, other: "State") -> None:
        """Make `other` continue from here: recurrent state whole, of the key/value cache only the part in use.

        Raises StateMismatch where `other` is of another model or too small for what this state holds.
        """
        self._check_kin(other)
        if other._own.capacity < self.position:
            raise StateMismatch(
                f"a state of capacity {other._own.capacity} cannot take the {self.position} tokens of this one"
            )
        other._cache = other._own
        for name, tensor in self._cache.tensors.items():
            other._cache.tensors[name][:, :, : self.position] = tensor[:, :, : self.position]
        self._continue_in(other)

    def lend_to(self, fork: "State") -> None:
        """Make `fork` continue from here without a copy of the rows: it reads these, and writes past `position`.

        That ends when this state reads on, or lends again: it takes the rows back, and the fork must not be run any
        more. `copy_into` saves what it holds before that. Raises StateMismatch where the fork is of another model.
        """
        self._check_kin(fork)
        fork._cache, self._cache.borrower = self._cache, fork
        self._continue_in(fork)

    def take_over(self, fork: "State") -> None:
        """Continue from where a fork went that works in this state's rows: they are there already."""
        if fork._cache is not self._own:
            raise StateMismatch("the fork works in other rows than this state's")
        fork.claim()
        fork._continue_in(self)

    @property
    def dispossessed(self) -> bool:
        """The rows that were lent to it have been taken back, or lent to another: it must not be run any more."""
        return self._cache is not self._own and self._cache.borrower is not self

    def works_in_rows_of(self, other: "State") -> bool:
        return self._cache is other._own

    def work_beside(self, other: "State") -> None:
        """Work in the same rows as `other`, a state of the same model, which may run from there to here."""
        self._check_kin(other)
        self._cache = other._cache

    def take_rows(self) -> None:
        """Go on in the place of the state that this one works beside: the rows are this one's to write."""
        if self._cache is not self._own:
            self._cache.borrower = self

    def arrays(self) -> dict[str, Floats]:
        """What it holds, by name: views of its buffers, of the key/value cache only the part in use."""
        used = {name: tensor[:, :, : self.position] for name, tensor in self._cache.tensors.items()}
        return {**self._recurrent, **used}

    def load(self, arrays: Mapping[str, Floats], position: int, rope_position: int) -> None:
        """Continue from what `arrays` gave of another state of this model, in this or another process.

        Raises StateMismatch, and changes nothing, where names, shapes or types are not those of `position` tokens.
        """
        if not 0 <= position <= self._own.capacity:
            raise StateMismatch(f"a state of capacity {self._own.capacity} cannot take {position} tokens")
        wanted = self.spec.state_shapes(position)
        for name, shape in wanted.items():
            found = arrays.get(name)
            if found is None or found.shape != shape or found.dtype != np.float32:
                raise StateMismatch(f"{name} is not float32 {list(shape)}: it is of another model")
        self._cache = self._own
        self._own.borrower = None
        for name in wanted:
            target = self._own.tensors[name][:, :, :position] if _is_cache(name) else self._recurrent[name]
            target[...] = arrays[name]
        self.position, self.rope_position = position, rope_position

    def claim(self) -> None:
        """Called before each run. Raises StateMismatch where the rows that were lent have been taken back."""
        if self._cache is self._own:
            self._own.borrower = None
        elif self.dispossessed:
            raise StateMismatch("the rows this fork works in were taken back by their owner")

    def _continue_in(self, other: "State") -> None:
        for name, tensor in self._recurrent.items():
            other._recurrent[name][...] = tensor
        other.position = self.position
        other.rope_position = self.rope_position

    def _check_kin(self, other: "State") -> None:
        if other.spec is not self.spec:  # two models of one shape have equal specs
            raise StateMismatch("the two states belong to different models")


class _Pages:
    """Float32 tensors in pages of their own, which take memory once they are written: until then they are zeros."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.tensors: dict[str, Floats] = {}
        self._maps: list[mmap.mmap] = []
        for name, shape in shapes.items():
            size = math.prod(shape)
            pages = mmap.mmap(-1, max(4 * size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.tensors[name] = np.ndarray(shape, np.float32, pages)
            self._maps.append(pages)

    def clear(self) -> None:
        """Zeros again, which take no memory."""
        for pages in self._maps:
            pages.madvise(mmap.MADV_DONTNEED)


def _is_cache(name: str) -> bool:
    return name.startswith(("key.", "value."))
