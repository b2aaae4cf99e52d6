"""The recurrent decoder: advances a State in place over token embeddings, and gives logits where they are asked for.

Past and present state are bound to the same buffers, which onnxruntime's kernels allow (bit-identical to separate ones)
and which saves copying the whole state at every step.
"""

from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from iotd.errors import ContextOverflow, InvalidInput, PackageError, StateMismatch
from iotd.model.head import MOST_ROWS, Head
from iotd.model.package import DECODER
from iotd.model.session import OpenGraph
from iotd.model.spec import ModelSpec
from iotd.model.state import Cache, State
from iotd.model.table import RowTable

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
CHUNK = 128
"""Most tokens in one run: the graph's activations grow with it, its speed hardly does beyond this."""


class Decoder:
    """One opened decoder graph. Not thread-safe: one thread owns it."""

    def __init__(self, folder: Path, spec: ModelSpec, table: RowTable, head: Head, open_graph: OpenGraph) -> None:
        """table: of the embedding."""
        self.spec = spec
        self._head = head
        self._session = open_graph(folder / DECODER)
        self._check_graph(folder / DECODER)
        self._table = table
        self._embeds = np.zeros((1, CHUNK, spec.hidden_size), np.float32)
        self._positions = np.zeros(3 * CHUNK, np.int64)
        self._token = np.zeros(1, np.int64)
        self._rows = np.zeros(MOST_ROWS, np.int64)
        self._last = np.zeros(1, np.int32)
        self._total = np.zeros(1, np.int32)
        self._hidden = np.zeros((1, MOST_ROWS, spec.hidden_size), np.float32)
        self._bindings: WeakKeyDictionary[State, WeakKeyDictionary[Cache, ort.IOBinding]] = WeakKeyDictionary()
        self._cos, self._sin = rotary_tables(spec, 0)

    def prefill(
        self, state: State, token_ids: Sequence[int] | Ints, *, logits: bool = True, only: Ints | None = None
    ) -> Floats | None:
        """Read tokens, int64 [T], into the state. Returns float32 [V] after the last of them, or None without `logits`.

        Of `only` some tokens, int64 [n], where no others will be taken.
        Raises ContextOverflow or InvalidInput before anything is run.
        """
        ids = self._checked_ids(token_ids)
        self._check_room(state, len(ids))
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            last = start + CHUNK >= len(ids)
            self._run(state, self._embed(state, part), int(logits and last))
            state.rope_position += len(part)
        return self._logits(only) if logits else None

    def step(self, state: State, token_id: int, *, only: Ints | None = None) -> Floats:
        """Read one token. Returns float32 [V], a view that the next call overwrites; `only` is as in `prefill`."""
        self._check_room(state, 1)
        if not 0 <= token_id < self.spec.vocab_size:
            raise InvalidInput(f"token id {token_id} is outside of the vocabulary of {self.spec.vocab_size}")
        self._token[0] = token_id
        self._table.rows(self._token, self._embeds[0, :1])
        self._run(state, np.full((3, 1), state.rope_position), 1)
        state.rope_position += 1
        logits: Floats = self._head.logits(self._hidden[0, :1], only=only)[0]
        return logits

    def verify(
        self, state: State, beside: State, token_ids: Sequence[int], n_rows: int, *, only: Ints | None = None
    ) -> Floats:
        """Read a few tokens after `state`, which stays as it is; it is `beside`, without rows of its own, that has read
        them. Returns float32 [n_rows, V] after each of the last of them, a view that the next call overwrites; `only`
        is as in `prefill`.

        Raises ContextOverflow or InvalidInput before anything is run, as for more than CHUNK tokens or MOST_ROWS rows.
        """
        ids = self._checked_ids(token_ids)
        self._check_room(state, len(ids))
        if not 1 <= n_rows <= min(len(ids), MOST_ROWS) or len(ids) > CHUNK:
            most = f"{MOST_ROWS} of {CHUNK}"
            raise InvalidInput(f"logits of {n_rows} of {len(ids)} tokens: at most {most} are verified at once")
        positions = self._embed(state, ids)
        beside.work_beside(state)
        beside.position, beside.rope_position = state.position, state.rope_position + len(ids)
        self._run(beside, positions, n_rows, after=state)
        return self._head.logits(self._hidden[0, :n_rows], only=only)

    def logits_along(self, state: State, token_ids: Sequence[int] | Ints) -> Floats:
        """Read tokens, int64 [T], into the state. Returns float32 [T, V]: exact logits behind each of them.

        Raises ContextOverflow or InvalidInput before anything is run.
        """
        ids = self._checked_ids(token_ids)
        self._check_room(state, len(ids))
        found = np.empty((len(ids), self.spec.vocab_size), np.float32)
        every = np.arange(self.spec.vocab_size)
        for start in range(0, len(ids), MOST_ROWS):
            part = ids[start : start + MOST_ROWS]
            self._run(state, self._embed(state, part), len(part))
            state.rope_position += len(part)
            found[start : start + len(part)] = self._head.logits(self._hidden[0, : len(part)], only=every)
        return found

    def prefill_embeddings(
        self, state: State, embeddings: Floats, positions: Ints, rope_span: int, *, logits: bool = False
    ) -> Floats | None:
        """Read float32 [n, D] at rotary offsets int64 [3, n] from the state's own, which then moves by `rope_span`.

        Raises ContextOverflow before anything is run.
        """
        self._check_room(state, len(embeddings))
        base = state.rope_position
        for start in range(0, len(embeddings), CHUNK):
            part = embeddings[start : start + CHUNK]
            self._embeds[0, : len(part)] = part
            last = start + CHUNK >= len(embeddings)
            self._run(state, base + positions[:, start : start + CHUNK], int(logits and last))
        state.rope_position = base + rope_span
        return self._logits() if logits else None

    def _logits(self, only: Ints | None = None) -> Floats:
        """Of the hidden state that the last run gave."""
        found: Floats = self._head.logits(self._hidden[0, :1], only=only)[0].copy()
        return found

    def _embed(self, state: State, ids: Ints) -> Ints:
        """Write the tokens' embeddings into the input buffer. Returns their rotary positions, int64 [3, T]."""
        self._table.rows(ids, self._embeds[0, : len(ids)])
        return np.broadcast_to(state.rope_position + np.arange(len(ids)), (3, len(ids)))

    def end_profile(self) -> Path:
        """Of a session that was opened for it."""
        return Path(self._session.end_profiling())

    def _run(self, state: State, positions: Ints, n_rows: int, after: State | None = None) -> None:
        """Advance the state over the embeddings in the input buffer, float32 [1, T, D], at rotary positions [3, T].

        n_rows: of how many of the last tokens hidden states are given. after: go on from that state instead, which
        stays as it is.
        """
        length = positions.shape[1]
        self._positions[: 3 * length] = positions.reshape(-1)
        self._rows[:n_rows] = np.arange(length - n_rows, length)
        if after is None:
            binding = self._binding(state)
        else:
            after.claim()
            binding = self._bind(after, state)
        state.position += length
        self._last[0] = state.position - 1
        self._total[0] = state.position
        binding.bind_input(
            "inputs_embeds", "cpu", 0, np.float32, (1, length, self.spec.hidden_size), self._embeds.ctypes.data
        )
        binding.bind_input("position_ids", "cpu", 0, np.int64, (3, 1, length), self._positions.ctypes.data)
        binding.bind_input("hidden_rows", "cpu", 0, np.int64, (n_rows,), self._rows.ctypes.data)
        binding.bind_output(
            "hidden", "cpu", 0, np.float32, (1, n_rows, self.spec.hidden_size), self._hidden.ctypes.data
        )
        self._session.run_with_iobinding(binding)

    def _binding(self, state: State) -> ort.IOBinding:
        state.claim()
        bindings = self._bindings.get(state)
        binding = None if bindings is None else bindings.get(state.cache)
        if binding is None:
            if state.spec is not self.spec:  # two models of one shape have equal specs
                raise StateMismatch("this state belongs to another model")
            binding = self._bind(state, state)
            self._bindings.setdefault(state, WeakKeyDictionary())[state.cache] = binding
        return binding

    def _bind(self, past: State, present: State) -> ort.IOBinding:
        if len(self._cos) < past.capacity:
            self._cos, self._sin = rotary_tables(self.spec, past.capacity)
            self._bindings.clear()
        binding = self._session.io_binding()
        for bind, side, state in ((binding.bind_input, "past", past), (binding.bind_output, "present", present)):
            for name, tensor in state.tensors.items():
                bind(f"{side}.{name}", "cpu", 0, np.float32, tensor.shape, tensor.ctypes.data)
        for name, table in (("cos_table", self._cos), ("sin_table", self._sin)):
            binding.bind_input(name, "cpu", 0, np.float32, table.shape, table.ctypes.data)
        for name, scalar in (("last_position", self._last), ("total_positions", self._total)):
            binding.bind_input(name, "cpu", 0, np.int32, (1,), scalar.ctypes.data)
        return binding

    def _check_graph(self, path: Path) -> None:
        """What is bound by its address must have the shape that the graph takes it for."""
        expected = {f"past.{name}": shape for name, shape in self.spec.state_shapes(0).items()}
        expected |= {"inputs_embeds": (1, 0, self.spec.hidden_size), "hidden": (1, 0, self.spec.hidden_size)}
        expected |= {"cos_table": (0, self.spec.rotary_dim // 2), "sin_table": (0, self.spec.rotary_dim // 2)}
        nodes = [*self._session.get_inputs(), *self._session.get_outputs()]
        found = {node.name: [side if isinstance(side, int) else 0 for side in node.shape] for node in nodes}
        for name, shape in expected.items():
            if found.get(name) != list(shape):
                raise PackageError(
                    f"{path} has {name} of shape {found.get(name)}, its manifest {list(shape)}: convert it again"
                )

    def _checked_ids(self, token_ids: Sequence[int] | Ints) -> Ints:
        ids = np.asarray(token_ids)
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
            raise InvalidInput("a prefill takes token ids, at least one of them")
        if ids.min() < 0 or ids.max() >= self.spec.vocab_size:
            raise InvalidInput(f"a token id is outside of the vocabulary of {self.spec.vocab_size}")
        return ids.astype(np.int64, copy=False)

    def _check_room(self, state: State, needed: int) -> None:
        if needed > state.available:
            raise ContextOverflow(needed, state.available)


def rotary_tables(spec: ModelSpec, positions: int) -> tuple[Floats, Floats]:
    """cos and sin, float32 [positions, rotary_dim / 2], of position · theta^(−2i / rotary_dim) (RoFormer, eq. 15)."""
    exponents = np.arange(0, spec.rotary_dim, 2, dtype=np.float32) / spec.rotary_dim
    inverse = (1.0 / np.power(np.float32(spec.rope_theta), exponents)).astype(np.float32)
    angles = np.arange(positions, dtype=np.float32)[:, None] * inverse
    return np.cos(angles), np.sin(angles)
