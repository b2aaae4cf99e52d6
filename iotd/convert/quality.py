"""How far a quantised model's next-token distributions are from those of its float32 original.

Knows no graph and no package: logits in, figures out.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iotd.convert.weights import Matrix, slices
from iotd.model.package import Quality

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Logits = Callable[[Floats], Floats]
"""Of hidden states, float32 [R, D], the logits, float32 [R, V]."""
FIRST = 8
"""Tokens of a text that are left out: what follows so little is anybody's guess."""
ROWS = 64
"""Positions of which logits are in memory at once."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Position by position, each [n]."""

    kld: Floats
    """Kullback-Leibler divergence from the reference's distribution to the other, in nats."""
    agree: NDArray[np.bool_]
    """Whether the likeliest token is the same."""
    surprise: Floats
    """−log p of the token that follows, in nats; NaN where it has no logit."""
    reference_surprise: Floats


def divergence(reference: Floats, found: Floats, targets: Ints) -> Divergence:
    """reference, found: logits, float32 [R, V]; a token without a logit has −∞ in both. targets: int64 [R],
    −1 for one that has no logit."""
    expected, actual = _log_softmax(reference), _log_softmax(found)
    p = np.exp(expected)
    terms = np.where(p > 0, p * (np.where(p > 0, expected, 0) - np.where(p > 0, actual, 0)), 0)
    return Divergence(
        kld=np.maximum(terms.sum(axis=1), 0).astype(np.float32),
        agree=reference.argmax(axis=1) == found.argmax(axis=1),
        surprise=_surprise(actual, targets),
        reference_surprise=_surprise(expected, targets),
    )


def by_kind(parts: Iterable[tuple[str, Divergence]]) -> list[Quality]:
    """The figures of each kind of text, of all its parts together."""
    kinds: dict[str, list[Divergence]] = {}
    for kind, part in parts:
        kinds.setdefault(kind, []).append(part)
    return [_quality(kind, _joined(found)) for kind, found in kinds.items()]


def compare(
    texts: Iterable[tuple[str, Ints]], reference: Floats, found: Floats, reference_logits: Logits, logits: Logits
) -> Iterator[tuple[str, Divergence]]:
    """By the hidden states behind each token of some texts, float32 [n, D], text after text; ROWS positions at a time.

    texts: kind and tokens, int64 [T], of each.
    """
    start = 0
    for kind, ids in texts:
        judged = scored(len(ids))
        for first in range(judged.start, judged.stop, ROWS):
            last = min(first + ROWS, judged.stop)
            rows = slice(start + first, start + last)
            both = reference_logits(reference[rows]), logits(found[rows])
            yield kind, divergence(*both, ids[first + 1 : last + 1])
        start += len(ids)


def _joined(found: list[Divergence]) -> Divergence:
    """Behind each other."""
    return Divergence(
        np.concatenate([part.kld for part in found]),
        np.concatenate([part.agree for part in found]),
        np.concatenate([part.surprise for part in found]),
        np.concatenate([part.reference_surprise for part in found]),
    )


def _quality(kind: str, found: Divergence) -> Quality:
    return Quality(
        kind=kind,
        n_tokens=len(found.kld),
        kld_mean=float(found.kld.mean()),
        kld_median=float(np.median(found.kld)),
        kld_p99=float(np.quantile(found.kld, 0.99)),
        top1=float(found.agree.mean()),
        ppl=float(np.exp(np.nanmean(found.surprise))),
        ppl_float=float(np.exp(np.nanmean(found.reference_surprise))),
    )


def scored(length: int) -> slice:
    """Of a text of so many tokens, the positions whose next token is judged."""
    return slice(min(FIRST, length - 1), length - 1)


def float_logits(head: Matrix) -> Logits:
    """By a head in float32, read in slices of rows."""

    def logits(hidden: Floats) -> Floats:
        return np.concatenate([hidden @ head.read(start, stop).T for start, stop in slices(head)], axis=1)

    return logits


def _surprise(log_p: Floats, targets: Ints) -> Floats:
    return np.where(targets < 0, np.float32(np.nan), -log_p[np.arange(len(targets)), targets])


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=1, keepdims=True)
    found: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found
