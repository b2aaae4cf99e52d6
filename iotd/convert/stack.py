"""A model as a stack of layers that are written, and run, one at a time: no more than one is in memory as floats."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from iotd.convert.decoder import DecoderWriter
from iotd.convert.graph import GraphWriter
from iotd.convert.weights import Matrix, Weights
from iotd.model.decoder import rotary_tables
from iotd.model.spec import ModelSpec


class Stack(Protocol):
    n_layers: int
    hidden_size: int

    def embedding(self) -> Matrix:
        """float32 [V, D]; it is the head, too, where `head` gives None."""
        ...

    def head(self) -> Matrix | None:
        """A head of its own, float32 [V, D]."""
        ...

    def write_layer(self, graph: GraphWriter, i: int) -> None:
        """Layer i alone: `residual`, float32 [1, T, D], to `residual_out`."""
        ...

    def write_end(self, graph: GraphWriter) -> None:
        """The last norm alone: `residual`, float32 [1, T, D], to `hidden`."""
        ...

    def feeds(self, i: int, length: int) -> dict[str, NDArray[Any]]:
        """The other inputs of layer i, for a sequence of so many tokens from its beginning."""
        ...


class TextStack:
    """The text model of a Qwen3.5 checkpoint."""

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        self.n_layers = len(spec.layers)
        self.hidden_size = spec.hidden_size
        self._spec = spec
        self._weights = weights

    def embedding(self) -> Matrix:
        return self._matrix("text.embed_tokens.weight")

    def head(self) -> Matrix | None:
        return None if self._spec.tied else self._matrix("head.weight")

    def _matrix(self, name: str) -> Matrix:
        return self._weights.matrix(name, self._spec.vocab_size, self._spec.hidden_size)

    def write_layer(self, graph: GraphWriter, i: int) -> None:
        DecoderWriter(graph, self._spec, self._weights).write_layer(i)

    def write_end(self, graph: GraphWriter) -> None:
        DecoderWriter(graph, self._spec, self._weights).write_end()

    def feeds(self, i: int, length: int) -> dict[str, NDArray[Any]]:
        spec = self._spec
        feeds: dict[str, NDArray[Any]] = {
            f"past.{name}": np.zeros(shape, np.float32) for name, shape in spec.state_shapes(length, [i]).items()
        }
        if spec.layers[i] == "full":
            cos, sin = rotary_tables(spec, length)
            feeds |= {"cos_table": cos, "sin_table": sin}
            feeds["position_ids"] = np.broadcast_to(np.arange(length), (3, 1, length)).copy()
            feeds["last_position"] = np.array([length - 1], np.int32)
            feeds["total_positions"] = np.array([length], np.int32)
        return feeds
