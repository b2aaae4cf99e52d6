"""How far the distributions of one model are from those of another. Knows arrays only."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Distances:
    """Of each position, [N]."""

    kld: Floats
    """Kullback-Leibler divergence from the reference, nats."""
    agree: NDArray[np.bool_]
    """Whether the likeliest token is the reference's."""
    loss: Floats
    """Negative log likelihood of the token that follows, nats."""
    loss_float: Floats
    """The same of the reference."""


def distances(reference: Floats, logits: Floats, targets: Ints) -> Distances:
    """reference, logits: float32 [N, V], overwritten. targets: the tokens that follow, int64 [N]."""
    agree = reference.argmax(axis=1) == logits.argmax(axis=1)
    for values in (reference, logits):
        values -= values.max(axis=1, keepdims=True)
        values -= np.log(np.exp(values).sum(axis=1, keepdims=True))
    each = np.arange(len(targets))
    loss, loss_float = -logits[each, targets], -reference[each, targets]
    logits -= reference
    kld = -np.einsum("nv,nv->n", np.exp(reference, out=reference), logits)
    return Distances(kld, agree, loss, loss_float)


def joined(parts: list[Distances]) -> Distances:
    """The positions of several, one after the other."""
    return Distances(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("kld", "agree", "loss", "loss_float"))
    )


def summary(found: Distances) -> dict[str, float]:
    """The yardstick's figures of one text."""
    return {
        "kld_mean": float(found.kld.mean()),
        "kld_median": float(np.median(found.kld)),
        "kld_p99": float(np.quantile(found.kld, 0.99)),
        "top1": float(found.agree.mean()),
        "ppl": float(np.exp(found.loss.mean())),
        "ppl_float": float(np.exp(found.loss_float.mean())),
    }
