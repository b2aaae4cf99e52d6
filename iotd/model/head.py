"""Logits of hidden states: all of them, those that a coarse head says may be the largest, or those of a few tokens.

A vocabulary of 248,320 makes the head a third of all bytes that a token reads. Knows no state and no sampling.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from iotd.errors import PackageError
from iotd.model.activations import Rounding, nearest_to
from iotd.model.package import COARSE_HEAD, HEAD, HEAD_IDS, HeadEntry
from iotd.model.sampling import nth_largest
from iotd.model.session import OpenGraph
from iotd.model.spec import ModelSpec
from iotd.model.table import RowTable

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
HeadKind = Literal["exact", "two-stage", "coarse"]
"""`coarse` is `two-stage` without a doubt: it never falls back to all logits, for measuring."""
HeadChoice = Literal["auto", "exact", "two-stage", "coarse"]
"""`auto` is `two-stage` where conversion found that it holds what it promises, else `exact`."""
MOST_ROWS = 8
"""Hidden states in one run, at most."""
FEW = 512
"""Tokens whose logits are cheaper by their rows than all together."""
PENALTY = 2.0
"""Of a presence penalty at most, that moves tokens which were drawn before against others."""
PROBED = 64
"""Rows by which the exact head is known."""


def head_in_use(entry: HeadEntry, choice: HeadChoice) -> tuple[HeadKind, str]:
    """The head that a package's entry makes of a choice, and why, for people. Raises PackageError where it has none."""
    if choice == "exact":
        return "exact", "as configured"
    coarse = entry.coarse
    if coarse is None:
        because = entry.exact_because or "it was converted by an older iotd"
        if choice == "auto":
            return "exact", because
        raise PackageError(
            f"there is no coarse head for a {choice} one ({because}): choose auto or exact, or convert the checkpoint "
            "again, with calibration"
        )
    if choice == "auto" and entry.exact_because:
        return "exact", entry.exact_because
    found = (
        f"the likeliest token in {coarse.argmax:.2%} of {coarse.n_states} states, all logits in {coarse.fallback:.1%}"
    )
    return ("two-stage" if choice == "auto" else choice), found


class Head:
    """One opened head. Not thread-safe: one thread owns it."""

    def __init__(
        self, folder: Path, entry: HeadEntry, spec: ModelSpec, open_graph: OpenGraph, choice: HeadChoice = "exact"
    ) -> None:
        """Raises PackageError where the files are not what the manifest says, or lack the head that was chosen."""
        self.kind, _ = head_in_use(entry, choice)
        self.vocab_size = spec.vocab_size
        self._exact = Graph(folder / HEAD, entry.rows, spec.hidden_size, open_graph)
        self._rows = Rows(RowTable(folder, entry.table, entry.rows, spec.hidden_size), entry, self._exact)
        self._ids = _ids(folder / HEAD_IDS, entry.rows, spec.vocab_size) if entry.rows < spec.vocab_size else None
        self._coarse: Coarse | None = None
        if self.kind != "exact":
            assert entry.coarse is not None
            graph = Graph(folder / COARSE_HEAD, entry.rows, spec.hidden_size, open_graph)
            self._coarse = Coarse(graph, self._rows.logits, entry.coarse.candidates, entry.coarse.deviations)
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
        if only is not None and len(only) <= min(FEW, self.vocab_size - 1):
            logits = self._blank(len(hidden))
            for row, state in zip(logits, hidden, strict=True):
                row[only] = self.some(state, only)
            return logits
        if only is not None or self._coarse is None:
            return self._all(hidden)
        return self._likely(hidden, self._coarse)

    def _all(self, hidden: Floats) -> Floats:
        if self._ids is None:
            return self._exact.run(hidden)
        logits = self._blank(len(hidden))
        logits[:, self._ids] = self._exact.run(hidden)
        return logits

    def _likely(self, hidden: Floats, coarse: "Coarse") -> Floats:
        """Of the tokens that may have the largest logit; of all where that cannot be told."""
        logits = self._blank(len(hidden))
        tokens: Ints | slice = slice(None) if self._ids is None else self._ids
        unsure = []
        for n, found in enumerate(coarse.likely(hidden)):
            logits[n, found.rows if self._ids is None else self._ids[found.rows]] = found.logits
            if not found.sure and self.kind == "two-stage":
                unsure.append(n)
        if unsure:
            for n, whole in zip(unsure, self._exact.run(hidden[unsure]), strict=True):
                logits[n, tokens] = whole
        return logits

    def _blank(self, n_rows: int) -> Floats:
        if len(self._logits) < n_rows:
            self._logits = np.zeros((MOST_ROWS, self.vocab_size), np.float32)
        logits = self._logits[:n_rows]
        logits.fill(-np.inf)
        return logits

    def some(self, hidden: Floats, ids: Ints) -> Floats:
        """Of float32 [D] the logits of a few tokens, int64 [n] → float32 [n]; −∞ for those not on the shortlist."""
        if self._ids is None:
            return self._rows.logits(hidden, ids)
        at = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1)
        return np.where(self._ids[at] == ids, self._rows.logits(hidden, at), -np.inf).astype(np.float32)


class Rows:
    """The exact head's logits row by row, but for the last bits of floating point."""

    def __init__(self, table: RowTable, entry: HeadEntry, exact: "Graph") -> None:
        self._table = table
        self._entry = entry
        self._exact = exact
        self._rounded: Rounding | None = None

    def logits(self, hidden: Floats, rows: Ints) -> Floats:
        """float32 [D], int64 [n] → float32 [n]."""
        if self._rounded is None:
            self._rounded = self._probe(len(hidden))
        return self._table.products(rows, self._rounded(hidden))

    def _probe(self, hidden_size: int) -> Rounding:
        """How this machine's kernel rounds hidden states."""
        if self._entry.table.bits == 32:
            return lambda hidden: hidden
        random = np.random.default_rng(0)
        hidden = random.standard_normal(hidden_size).astype(np.float32)
        hidden[:: max(1, hidden_size // 4)] *= 30
        rows = np.linspace(0, self._entry.rows - 1, min(PROBED, self._entry.rows)).astype(np.int64)
        expected = self._exact.run(hidden[None])[0, rows]
        block = self._entry.table.block
        return nearest_to(expected, hidden, lambda vector: self._table.products(rows, vector), block)


class Likely(NamedTuple):
    """What a coarse head found for one hidden state."""

    rows: Ints
    """Of the head, int64 [n]: the candidates."""
    logits: Floats
    """Their exact logits, float32 [n]."""
    sure: bool
    """No other row has the largest logit, whatever presence penalty there is."""


class Coarse:
    """Finds the rows of the head that may have the largest logit."""

    def __init__(
        self, graph: "Graph", exact: Callable[[Floats, Ints], Floats], candidates: int, deviations: float
    ) -> None:
        """exact: logits of one hidden state, float32 [D], for rows int64 [n].

        deviations: of what the coarse logits of the candidates are off by, that those of other rows are off by at most.
        """
        self.candidates = candidates
        self._graph = graph
        self._exact = exact
        self._deviations = deviations

    def likely(self, hidden: Floats) -> list[Likely]:
        """float32 [R, D]: the candidates of each, at least `candidates`."""
        return [self.settle(*each) for each in zip(hidden, self._graph.run(hidden), strict=True)]

    def settle(self, hidden: Floats, coarse: Floats) -> Likely:
        """Of a hidden state, float32 [D], and its coarse logits, float32 [rows]."""
        least = nth_largest(coarse, self.candidates)
        rows = np.flatnonzero(coarse >= least)
        exact = self._exact(hidden, rows)
        off = exact - coarse[rows]
        most = least + off.mean() + self._deviations * off.std() + PENALTY
        return Likely(rows, exact, bool(len(rows) == len(coarse) or exact.max() >= most))


class Graph:
    """A graph from hidden states to logits, its buffers bound once."""

    def __init__(self, path: Path, rows: int, columns: int, open_graph: OpenGraph) -> None:
        """Raises PackageError where it has another shape."""
        self._session = open_graph(path)
        found = {node.name: node.shape[1:] for node in (*self._session.get_inputs(), *self._session.get_outputs())}
        if found != {"hidden": [columns], "logits": [rows]}:
            raise PackageError(f"{path} is not the head of {rows} × {columns} of its manifest: convert it again")
        self.n_rows = rows
        self._hidden = np.zeros((MOST_ROWS, columns), np.float32)
        self._logits = np.zeros((1, rows), np.float32)
        self._bindings: dict[int, ort.IOBinding] = {}

    def run(self, hidden: Floats) -> Floats:
        """float32 [R, D], R at most MOST_ROWS, → float32 [R, rows], a view that the next call overwrites."""
        n = len(hidden)
        self._hidden[:n] = hidden
        if n > len(self._logits):
            self._logits = np.zeros((MOST_ROWS, self.n_rows), np.float32)
            self._bindings.clear()
        if n not in self._bindings:
            binding = self._bindings[n] = self._session.io_binding()
            shape, address = (n, self._hidden.shape[1]), self._hidden.ctypes.data
            binding.bind_input("hidden", "cpu", 0, np.float32, shape, address)
            binding.bind_output("logits", "cpu", 0, np.float32, (n, self.n_rows), self._logits.ctypes.data)
        self._session.run_with_iobinding(self._bindings[n])
        return self._logits[:n]


def _ids(path: Path, rows: int, vocab_size: int) -> Ints:
    """The token of each row, ascending."""
    ids = np.fromfile(path, "<i4").astype(np.int64)
    if len(ids) != rows or ids[0] < 0 or ids[-1] >= vocab_size or (np.diff(ids) <= 0).any():
        raise PackageError(f"{path} does not hold the {rows} tokens its manifest describes: convert it again")
    return ids
