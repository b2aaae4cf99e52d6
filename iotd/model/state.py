"""The memory of one sequence: DeltaNet states, convolution tails and a key/value cache of fixed capacity.

Allocated once; copied, reset and handed to the decoder, which advances it in place. Knows nothing of tokens.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from iotd.errors import InvalidInput, StateMismatch
from iotd.model.spec import ModelSpec

Floats = NDArray[np.float32]


class State:
    """Everything a model remembers of what it has read. It belongs to the model whose `spec`, that very object, it has.

    `position` counts the tokens read; `rope_position` is the rotary position of the next one, which lags behind where
    an image took fewer positions than tokens.
    """

    def __init__(self, spec: ModelSpec, capacity: int) -> None:
        """Raises InvalidInput for a capacity that the model has no positions for."""
        if not 1 <= capacity <= spec.max_positions:
            raise InvalidInput(
                f"a state's capacity is 1 to {spec.max_positions} tokens, not {capacity}", field="capacity"
            )
        self.spec = spec
        self.capacity = capacity
        self.position = 0
        self.rope_position = 0
        # Written, unlike np.zeros: all of it is resident from the start, and what cannot be had is missed now.
        self._tensors: dict[str, Floats] = {
            name: np.full(shape, 0, np.float32) for name, shape in spec.state_shapes(capacity).items()
        }

    @property
    def tensors(self) -> Mapping[str, Floats]:
        """The state's own buffers by name; their addresses never change."""
        return self._tensors

    @property
    def nbytes(self) -> int:
        """Bytes allocated, all of them from the start."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @property
    def available(self) -> int:
        """Tokens that can still be read."""
        return self.capacity - self.position

    def reset(self) -> None:
        """Forget everything. Rows of the key/value cache past `position` are never read, so they need no clearing."""
        for name, tensor in self._tensors.items():
            if not _is_cache(name):
                tensor.fill(0)
        self.position = 0
        self.rope_position = 0

    def copy(self) -> "State":
        """A new state of the same capacity that continues from here."""
        other = State(self.spec, self.capacity)
        self.copy_into(other)
        return other

    def copy_into(self, other: "State") -> None:
        """Make `other` continue from here: recurrent state whole, of the key/value cache only the part in use.

        Raises StateMismatch where `other` is of another model or too small for what this state holds.
        """
        if other.spec is not self.spec:  # two models of one shape have equal specs
            raise StateMismatch("the two states belong to different models")
        if other.capacity < self.position:
            raise StateMismatch(
                f"a state of capacity {other.capacity} cannot take the {self.position} tokens of this one"
            )
        used = self.position
        for name, tensor in self._tensors.items():
            target = other._tensors[name]
            if _is_cache(name):
                target[:, :, :used] = tensor[:, :, :used]
            else:
                target[...] = tensor
        other.position = self.position
        other.rope_position = self.rope_position


def _is_cache(name: str) -> bool:
    return name.startswith(("key.", "value."))
