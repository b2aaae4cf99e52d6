"""A model small enough to reason about: its logits depend on everything it has read, in order, and on nothing else.

It keeps the contract of `iotd.model.Model`. Every run of it is announced to `on_run` first, where a test can move a
manual clock, wait, or raise. Text is bytes; answers are lower-case letters.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iotd.errors import ContextOverflow, StateMismatch
from iotd.events import RGB, Format, Labels, Sampling
from iotd.model.chat import ChatTemplate, ImagePieces, Turn
from iotd.model.constrained import ConstrainedGeneration
from iotd.model.endings import Endings
from iotd.model.generation import Generation
from iotd.model.grammar import Constraint, Grammars
from iotd.model.head import MOST_ROWS
from iotd.model.labels import Path, Weighing, label_paths
from iotd.model.resize import target_size
from iotd.model.tokenizer import TextStream

MODULUS = (1 << 61) - 1
CONTROLS = ["<user>", "<system>", "<end>", "<image>", "</image>", "<close>", "<think>", "</think>"]
"""Control tokens; their ids follow those of the bytes."""
SHOWN = [bytes([n]) for n in range(256)] + [name.encode() for name in CONTROLS]
VOCAB = 256 + len(CONTROLS) + 1
EOS = VOCAB - 1
PIXELS_PER_SIDE = 2
"""Each token of an image stands for 2 × 2 pixels."""

Floats = NDArray[np.float32]
Run = Callable[[str, int], None]


class FakeState:
    """`trace` lists what was read: token ids, and for an image its bytes once per token."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.trace: list[Any] = []
        self.lender: FakeState | None = None
        self.borrower: FakeState | None = None
        self.nbytes = capacity * 8

    @property
    def position(self) -> int:
        return len(self.trace)

    @property
    def rope_position(self) -> int:
        return len(self.trace)

    @property
    def available(self) -> int:
        return self.capacity - self.position

    def reset(self) -> None:
        self.trace.clear()

    def skip(self, n_tokens: int) -> None:
        self.trace += [0] * n_tokens

    def copy_into(self, other: "FakeState") -> None:
        other.trace[:] = self.trace
        other.lender = None

    @property
    def dispossessed(self) -> bool:
        return self.lender is not None and self.lender.borrower is not self

    def works_in_rows_of(self, other: "FakeState") -> bool:
        return (self.lender or self) is other

    def arrays(self) -> dict[str, Any]:
        return {"trace": np.array(self.trace, object)}

    def load(self, arrays: dict[str, Any], position: int, rope_position: int) -> None:
        if len(arrays["trace"]) != position:
            raise StateMismatch("another trace")
        self.trace[:] = arrays["trace"]

    def take_over(self, fork: "FakeState") -> None:
        assert not fork.dispossessed
        fork.copy_into(self)

    def lend_to(self, fork: "FakeState") -> None:
        fork.capacity = self.capacity
        self.copy_into(fork)
        fork.lender, self.borrower = self, fork

    @property
    def text(self) -> str:
        """What was read, with control tokens in angle brackets and `#` for each token of an image."""
        return b"".join([b"#" if isinstance(item, bytes) else SHOWN[item] for item in self.trace]).decode()


class FakeTokenizer:
    """A token is a byte, or a control token where it is meant."""

    vocab_size = VOCAB
    control_ids = tuple(range(256, VOCAB))

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else CONTROLS[token - 256].encode() if token < EOS else b"<eos>"

    def encode_bytes(self, data: bytes) -> list[int]:
        return list(data)

    def encode(self, text: str, special: bool = False) -> list[int]:
        return self.encode_parts([(text, special)])

    def encode_parts(self, parts: Iterable[tuple[str, bool]]) -> list[int]:
        ids: list[int] = []
        for text, special in parts:
            for piece in re.split("(<[^>]+>)", text) if special else [text]:
                ids += [256 + CONTROLS.index(piece)] if special and piece in CONTROLS else piece.encode()
        return ids

    def stream(self) -> TextStream:
        return TextStream(self, frozenset())  # type: ignore[arg-type] # a stand-in


CHAT = ChatTemplate(
    no_system="",
    system=Turn("<system>", "<end>"),
    user=Turn("<user>", "<close>"),
    assistant=Turn("", ""),
    last_assistant=Turn("", ""),
    generation="",
    generation_thinking="<think>",
    image=ImagePieces("<image>", "", "</image>"),
    thinking_end="</think>",
)


class FakeModel:
    """`eos_every`: about one in so many tokens ends the turn; 0 never ends it."""

    name = fingerprint = "fake"
    every_token = np.arange(VOCAB)

    def __init__(self, on_run: Run | None = None, eos_every: int = 0, vision: bool = True) -> None:
        self.on_run = on_run or FakeModel.silent
        self.has_vision = vision
        self.spec = SimpleNamespace(
            vision=SimpleNamespace(size_factor=PIXELS_PER_SIDE, min_pixels=PIXELS_PER_SIDE**2) if vision else None
        )
        self.tokenizer = FakeTokenizer()
        self.chat = CHAT
        self.endings = Endings.of(self.tokenizer, CHAT, {EOS})  # type: ignore[arg-type] # a stand-in
        self._grammars = Grammars(self.tokenizer, {EOS})  # type: ignore[arg-type] # a stand-in
        self._eos_every = eos_every
        self.n_states = 0

    @staticmethod
    def silent(what: str, n_tokens: int) -> None:
        """The `on_run` of a model that nobody listens to."""

    def new_state(self, capacity: int) -> FakeState:
        self.n_states += 1
        return FakeState(capacity)

    def prefill(self, state: FakeState, tokens: Sequence[int], *, logits: bool = True, **_: Any) -> Floats | None:
        return self._run("prefill", state, list(tokens), logits)

    def step(self, state: FakeState, token: int, **_: Any) -> Floats:
        logits = self._run("step", state, [token], True)
        assert logits is not None
        return logits

    def image_size(self, shape: Sequence[int], max_pixels: int | None = None) -> tuple[int, int]:
        limits = {"factor": PIXELS_PER_SIDE, "min_pixels": 0, "max_pixels": max_pixels or 1 << 30}
        return target_size(shape[0], shape[1], **limits)

    def image_grid(self, shape: Sequence[int], max_pixels: int | None = None) -> tuple[int, int, int]:
        rows, columns = self.image_size(shape, max_pixels)
        return 1, rows // PIXELS_PER_SIDE, columns // PIXELS_PER_SIDE

    def image_tokens(self, grid: tuple[int, int, int]) -> int:
        return grid[0] * grid[1] * grid[2]

    def close_vision(self) -> None:
        pass

    def encode_image(self, rgb: RGB, size: tuple[int, int] | None = None) -> Floats:
        _, rows, columns = self.image_grid(size or rgb.shape)
        self.on_run("encode", rows * columns)
        return np.full((rows * columns, 2), rgb.mean(), np.float32)

    def prefill_embeddings(
        self,
        state: FakeState,
        embedding: Floats,
        *,
        grid: tuple[int, int, int],
        rows: slice = slice(None),
        logits: bool = False,
    ) -> Floats | None:
        assert embedding.shape[0] == grid[0] * grid[1] * grid[2]
        return self._run("place", state, [row.tobytes() for row in embedding[rows]], logits)

    def constraint(self, format: Format, max_tokens: int) -> Constraint:
        return self._grammars.constraint(format, max_tokens)

    def generation(
        self,
        state: FakeState,
        logits: Floats,
        sampling: Sampling,
        said: Iterable[int] | None = None,
        constraint: Constraint | None = None,
    ) -> Generation:
        parts: Any = self, state, logits, sampling, self.tokenizer.stream(), self.endings
        return Generation(*parts) if constraint is None else ConstrainedGeneration(*parts, constraint)

    def label_paths(self, labels: Sequence[str]) -> list[Path]:
        return label_paths(labels, self.tokenizer, None)  # type: ignore[arg-type] # a stand-in

    def weighing(self, state: FakeState, logits: Floats, labels: Labels, paths: Sequence[Path]) -> Weighing:
        parts: Any = self, state, FakeState(0), logits
        return Weighing(*parts, labels, paths)

    def verify(self, state: FakeState, beside: FakeState, tokens: Sequence[int], n_rows: int, **_: Any) -> Floats:
        assert 1 <= n_rows <= MOST_ROWS
        self.on_run("verify", len(tokens))
        if len(tokens) > state.available:
            raise ContextOverflow(len(tokens), state.available)
        rows = []
        for n in range(len(tokens) - n_rows + 1, len(tokens) + 1):
            beside.trace = [*state.trace, *tokens[:n]]
            rows.append(self.logits(beside))
        return np.array(rows)

    def logits(self, state: FakeState) -> Floats:
        """float32 [V]: one letter, or the end of the turn, stands out; which one, the whole history decides."""
        digest = 7
        for item in state.trace:
            value = item if isinstance(item, int) else int.from_bytes(item, "little") + VOCAB
            digest = (digest * 1_000_003 + value + 1) % MODULUS
        logits = np.full(VOCAB, -10.0, np.float32)
        ends = self._eos_every and digest % self._eos_every == 0
        logits[EOS if ends else ord("a") + digest % 26] = 10.0
        return logits

    def _run(self, what: str, state: FakeState, items: list[Any], logits: bool) -> Floats | None:
        if state.dispossessed:
            raise StateMismatch("the rows were taken back")
        if len(items) > state.available:
            raise ContextOverflow(len(items), state.available)
        self.on_run(what, len(items))
        state.trace.extend(items)
        return self.logits(state) if logits else None
