"""How far two predictions are apart."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def divergence(expected: Floats, found: Floats) -> float:
    """Mean KL divergence in nats of next-token distributions, from float32 [T, V] logits."""
    p, q = _log_softmax(expected), _log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def _log_softmax(logits: Floats) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
