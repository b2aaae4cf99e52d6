"""Rounding of a matrix so that what it computes changes least, given what it is multiplied by.

The error of y = W·x over many inputs is tr(E·H·Eᵀ), with E = W − Ŵ and H = E[x·xᵀ]. Columns are rounded one after the
other, and what each was off by is made up for in those that follow (GPTQ, Frantar et al., 2022, in the equivalent form
of LDLQ, Chee et al., 2023, which needs no inverse). The scales of all blocks are chosen ahead, so columns can be taken
in the order of their weight in H ("activation order") without any change of the stored layout.
Knows no file and no graph.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from iotd.convert.quantize import Blocks, Floats, group, inverse, pack, search_scales

DAMPING = 0.01
"""Of the mean of H's diagonal, added to it: the inputs that were seen are not all that will be."""
PART = 64
"""Columns whose errors are carried over to the rest in one product."""
ROWS = 4096
"""Rows that are rounded together."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a matrix is multiplied by: the second moment of its inputs, factored."""

    importance: Floats
    """float32 [columns], E[x²] of each input."""
    order: NDArray[np.intp]
    """Columns in the order in which they are rounded, the largest first."""
    feedback: Floats
    """float32 [columns, columns], strictly upper triangular, in that order: how much of a column's error each of those
    that follow takes on."""

    @classmethod
    def of(cls, moment: Floats) -> "Statistics":
        """moment: float32 [columns, columns], E[x·xᵀ]."""
        importance = np.ascontiguousarray(np.diagonal(moment))
        order = np.argsort(-importance, kind="stable")
        damped = moment[np.ix_(order, order)]
        damped[np.diag_indices_from(damped)] += DAMPING * max(float(importance.mean()), 1e-20)
        return cls(importance, order, _feedback(damped))


def _feedback(moment: Floats) -> Floats:
    """U − 1 of moment = U·D·Uᵀ, U unit upper triangular: a Cholesky factor of the matrix turned around."""
    lower = np.linalg.cholesky(moment[::-1, ::-1])
    upper = lower[::-1, ::-1]
    return np.triu(upper / np.diagonal(upper), 1).astype(np.float32)


def gptq(weight: Floats, bits: int, block: int, statistics: Statistics) -> Blocks:
    """Round float32 [rows, columns] to `bits` with one scale per `block` of a row."""
    rows, columns = weight.shape
    zero = 1 << (bits - 1)
    scales = search_scales(weight, bits, block, statistics.importance)
    found = np.empty((rows, columns), np.float32)
    for start in range(0, rows, ROWS):
        part = slice(start, start + ROWS)
        each = np.repeat(scales[part], block, axis=1)[:, :columns]
        found[part] = _round(weight[part], each, zero, statistics)
    return pack(group(found, block), scales, bits, columns)


def _round(weight: Floats, scales: Floats, zero: int, statistics: Statistics) -> Floats:
    """Levels, float32 [rows, columns], given each element's scale."""
    order, feedback = statistics.order, statistics.feedback
    # Columns as rows: each is then one run of memory.
    wanted = np.ascontiguousarray(weight.T[order])
    steps = np.ascontiguousarray(scales.T[order])
    per_step = inverse(steps)
    off = np.empty_like(wanted)
    found = np.empty_like(wanted)
    for start in range(0, len(wanted), PART):
        stop = min(start + PART, len(wanted))
        target = wanted[start:stop] + feedback[:start, start:stop].T @ off[:start]
        for k in range(start, stop):
            level = found[k]
            np.multiply(target[k - start], per_step[k], out=level)
            np.clip(np.rint(level, out=level), -zero, zero - 1, out=level)
            np.subtract(wanted[k], level * steps[k], out=off[k])
            if k + 1 < stop:
                target[k - start + 1 :] += feedback[k, k + 1 : stop, None] * off[k]
    levels = np.empty_like(found)
    levels[order] = found
    return levels.T
