"""Logits of hidden states: all of them, those that a coarse head says may be the largest, or those of a few tokens.

A vocabulary of 248,320 makes the head a third of all bytes that a token reads. Knows no state and no sampling.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from iotd.errors import PackageError
from iotd.model.package import COARSE_HEAD, HEAD, HEAD_IDS, HeadEntry
from iotd.model.sampling import nth_largest
from iotd.model.session import OpenGraph
from iotd.model.spec import ModelSpec
from iotd.model.table import RowTable

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
HeadKind = Literal["exact", "two-stage", "coarse"]
"""`coarse` is `two-stage` without a doubt: it never falls back to all logits, for measuring."""
MOST_ROWS = 8
"""Hidden states in one run, at most."""
FEW = 512
"""Tokens whose logits are cheaper one by one than all together."""
CANDIDATES = 128
"""Tokens, at least, whose exact logits the coarse head asks for."""
DEVIATIONS = 4.0
"""Of what the coarse head was off by, that a token which is no candidate may at most have been off by."""
TRUST_MEMORY = 0.1
LEAST_TRUST = 0.5
"""Part of the tokens that the coarse head must settle for it to be worth its time, about."""
PAUSE = 64
"""Tokens for which a coarse head that is not is left out."""


class Head:
    """One opened head. Not thread-safe: one thread owns it."""

    def __init__(
        self, folder: Path, entry: HeadEntry, spec: ModelSpec, open_graph: OpenGraph, kind: HeadKind = "exact"
    ) -> None:
        """Raises PackageError where the files are not what the manifest says."""
        self.vocab_size = spec.vocab_size
        self._exact = _Graph(folder / HEAD, entry.rows, spec.hidden_size, open_graph)
        self._table = RowTable(folder, entry.table, entry.rows, spec.hidden_size)
        self._ids = _ids(folder / HEAD_IDS, entry.rows, spec.vocab_size) if entry.rows < spec.vocab_size else None
        self._coarse: _Coarse | None = None
        if kind != "exact":
            graph = _Graph(folder / COARSE_HEAD, entry.rows, spec.hidden_size, open_graph)
            self._coarse = _Coarse(graph, self._some, doubts=kind == "two-stage")
        self._logits = np.zeros((1, spec.vocab_size), np.float32)

    @property
    def shortlist(self) -> Ints | None:
        """The tokens that have logits, int64 [n] ascending; None where all have."""
        return self._ids

    def logits(self, hidden: Floats, *, only: Ints | None = None) -> Floats:
        """float32 [R, D] → float32 [R, V], a view that the next call overwrites.

        only: tokens int64 [n] of which alone one will be taken: their logits are exact. A token whose logit was not
        computed has −∞: one that is not on the shortlist, and with a coarse head one that is not among those which may
        have the largest.
        """
        few = only is not None and len(only) <= min(FEW, self.vocab_size - 1)
        if not few and (only is not None or self._coarse is None):
            return self._all(hidden)
        logits = self._blank(len(hidden))
        for row, state in zip(logits, hidden, strict=True):
            tokens, values = (only, self.some(state, only)) if only is not None else self._likely(state)
            row[tokens] = values
        return logits

    def _all(self, hidden: Floats) -> Floats:
        if self._ids is None:
            return self._exact.run(hidden)
        logits = self._blank(len(hidden))
        logits[:, self._ids] = self._exact.run(hidden)
        return logits

    def _likely(self, hidden: Floats) -> tuple[Ints | slice, Floats]:
        """The tokens that may have the largest logit, all where that cannot be told, and their logits."""
        found = self._coarse.best(hidden) if self._coarse is not None else None
        rows, values = found or (slice(None), self._exact.run(hidden[None])[0])
        return rows if self._ids is None else self._ids[rows], values

    def _blank(self, n_rows: int) -> Floats:
        if len(self._logits) < n_rows:
            self._logits = np.zeros((MOST_ROWS, self.vocab_size), np.float32)
        logits = self._logits[:n_rows]
        logits.fill(-np.inf)
        return logits

    def some(self, hidden: Floats, ids: Ints) -> Floats:
        """Of float32 [D] the logits of a few tokens, int64 [n] → float32 [n]; −∞ for those not on the shortlist."""
        if self._ids is None:
            return self._some(hidden, ids)
        at = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1)
        return np.where(self._ids[at] == ids, self._some(hidden, at), -np.inf).astype(np.float32)

    def _some(self, hidden: Floats, rows: Ints) -> Floats:
        table = np.empty((len(rows), len(hidden)), np.float32)
        self._table.rows(rows, table)
        return table @ hidden


class _Coarse:
    """Finds the tokens that may have the largest logit."""

    def __init__(self, graph: "_Graph", exact: Callable[[Floats, Ints], Floats], *, doubts: bool) -> None:
        self._graph = graph
        self._exact = exact
        self._doubts = doubts
        self._trust = 1.0
        self._pause = 0

    def best(self, hidden: Floats) -> tuple[Ints, Floats] | None:
        """Rows of the head and their exact logits; None where the largest need not be among them.

        What the coarse head was off by for the candidates tells what it may be off by for the others.
        """
        if self._pause:
            self._pause -= 1
            return None
        coarse = self._graph.run(hidden[None])[0]
        least = nth_largest(coarse, CANDIDATES)
        rows = np.flatnonzero(coarse >= least)
        exact = self._exact(hidden, rows)
        if not self._doubts:
            return rows, exact
        off = exact - coarse[rows]
        sure = len(rows) == len(coarse) or exact.max() >= least + off.mean() + DEVIATIONS * off.std()
        self._trust += TRUST_MEMORY * (float(sure) - self._trust)
        if self._trust < LEAST_TRUST:
            self._pause, self._trust = PAUSE, 1.0
        return (rows, exact) if sure else None


class _Graph:
    """A graph from hidden states to logits, its buffers bound once."""

    def __init__(self, path: Path, rows: int, columns: int, open_graph: OpenGraph) -> None:
        self._session = open_graph(path)
        found = {node.name: node.shape[1:] for node in (*self._session.get_inputs(), *self._session.get_outputs())}
        if found != {"hidden": [columns], "logits": [rows]}:
            raise PackageError(f"{path} is not the head of {rows} × {columns} of its manifest: convert it again")
        self._rows = rows
        self._hidden = np.zeros((MOST_ROWS, columns), np.float32)
        self._logits = np.zeros((1, rows), np.float32)
        self._bindings: dict[int, ort.IOBinding] = {}

    def run(self, hidden: Floats) -> Floats:
        """float32 [R, D] → float32 [R, rows], a view that the next call overwrites."""
        n = len(hidden)
        self._hidden[:n] = hidden
        if n > len(self._logits):
            self._logits = np.zeros((MOST_ROWS, self._rows), np.float32)
            self._bindings.clear()
        if n not in self._bindings:
            binding = self._bindings[n] = self._session.io_binding()
            shape, address = (n, self._hidden.shape[1]), self._hidden.ctypes.data
            binding.bind_input("hidden", "cpu", 0, np.float32, shape, address)
            binding.bind_output("logits", "cpu", 0, np.float32, (n, self._rows), self._logits.ctypes.data)
        self._session.run_with_iobinding(self._bindings[n])
        return self._logits[:n]


def _ids(path: Path, rows: int, vocab_size: int) -> Ints:
    """The token of each row, ascending."""
    ids = np.fromfile(path, "<i4").astype(np.int64)
    if len(ids) != rows or ids[0] < 0 or ids[-1] >= vocab_size or (np.diff(ids) <= 0).any():
        raise PackageError(f"{path} does not hold the {rows} tokens its manifest describes: convert it again")
    return ids
