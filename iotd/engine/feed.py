"""The two units of work that bring a prompt into a state: encoding an image, and reading a chunk."""

import numpy as np
from numpy.typing import NDArray

from iotd.engine.entry import Chunk, Image
from iotd.model import Model
from iotd.model.state import State

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def encode(model: Model, image: Image) -> None:
    """Run the vision tower, once for each image; its pixels are let go."""
    assert image.rgb is not None
    image.embedding = model.encode_image(image.rgb, image.size)
    image.rgb = None


def feed(model: Model, state: State, chunk: Chunk, *, logits: bool = False, only: Ints | None = None) -> Floats | None:
    """Advance a state by one chunk. Returns float32 [V] after its last token where `logits` are wanted.

    only: the tokens that count, int64 [n], where not all of them do.
    """
    if isinstance(chunk, list):
        return model.prefill(state, chunk, logits=logits, only=only)
    image, rows = chunk.image, slice(chunk.start, chunk.stop)
    assert image.embedding is not None
    return model.prefill_embeddings(state, image.embedding, grid=image.grid, rows=rows, logits=logits)
