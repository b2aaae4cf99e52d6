"""The model as the rest of iotd sees it: one opened package, with what is needed to read and to answer."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from iotd.errors import ContextOverflow, InvalidInput
from iotd.events import RGB, Format, Labels, Sampling
from iotd.model.chat import ChatTemplate, Message
from iotd.model.constrained import ConstrainedGeneration
from iotd.model.decoder import Decoder
from iotd.model.endings import Endings
from iotd.model.generation import Drafting, Generation
from iotd.model.grammar import Constraint, Grammars
from iotd.model.head import Head, HeadChoice, HeadKind
from iotd.model.labels import Path as LabelPath
from iotd.model.labels import Weighing, label_paths
from iotd.model.lookup import Lookup
from iotd.model.package import CHAT, TOKENIZER, VISION, Manifest, read_manifest, verify
from iotd.model.packed import open_packed
from iotd.model.packed import pack as pack_graph
from iotd.model.sampling import sampling_of
from iotd.model.session import OpenGraph, Threads, open_session
from iotd.model.spec import ModelSpec
from iotd.model.state import State
from iotd.model.table import RowTable
from iotd.model.tokenizer import Tokenizer
from iotd.model.vision import Grid, VisionEncoder, check_image

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Tokens = Sequence[int] | Ints
ALL = slice(None)


class Model:
    """A package opened for inference on the CPU. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        open_graph: OpenGraph,
        max_image_pixels: int | None = None,
        head: HeadChoice = "exact",
    ) -> None:
        self.manifest = manifest
        self.tokenizer = Tokenizer.open(folder / TOKENIZER)
        self.chat = ChatTemplate.from_json((folder / CHAT).read_bytes())
        self.endings = Endings.of(self.tokenizer, self.chat, manifest.spec.eos_token_ids)
        """How its turns, sentences and thoughts end."""
        self._head = Head(folder, manifest.head, manifest.spec, open_graph, head)
        self._grammars = Grammars(self.tokenizer, manifest.spec.eos_token_ids)
        spec, tied = manifest.spec, manifest.embedding == manifest.head.table
        first = self._head.shortlist if tied else None
        table = RowTable(folder, manifest.embedding, spec.vocab_size, spec.hidden_size, first)
        self._decoder = Decoder(folder, spec, table, self._head, open_graph)
        vision = spec.vision
        self._vision = None if vision is None else VisionEncoder(folder, vision, open_graph, max_image_pixels)
        self._beside: State | None = None

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        threads: int = 2,
        spinning: bool = True,
        affinity: bool = False,
        max_image_pixels: int | None = None,
        head: HeadChoice = "exact",
        pack: bool = True,
        profile: Path | None = None,
    ) -> "Model":
        """Open the package in the folder `path`, checking its files against its manifest.

        `threads` compute, and `spinning` and `affinity` are as `iotd.model.session.Threads` has them.
        `max_image_pixels` bounds the size images are resized to, below the package's own bound. `head` says how logits
        are made: all of them, or with "two-stage" those that may be the largest, as far as a coarse head can tell, or
        with "auto" as conversion found it right.
        `pack` keeps the weights of a large package in the cache as this machine's kernels want them: half the memory, a
        faster start.
        `profile` measures the decoder's operators up to `end_profile`, with a file's name to begin with; nothing is
        packed then.
        Raises PackageError for what is no package, damaged, or of another format, or lacks the head.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        verify(folder, manifest)
        compute = Threads(threads, spinning, affinity)
        if not pack or profile is not None:
            open_plain = partial(open_session, threads=compute, profile=profile)
            return cls(folder, manifest, open_plain, max_image_pixels, head)
        if manifest.spec.vision is not None:
            # Now, and not when the first image comes: on a slow card it takes a while.
            pack_graph(folder / VISION, compute, manifest.fingerprint)
        open_graph = partial(open_packed, threads=compute, fingerprint=manifest.fingerprint)
        return cls(folder, manifest, open_graph, max_image_pixels, head)

    @property
    def name(self) -> str:
        """The checkpoint's name and the recipe, for people to read."""
        return f"{self.manifest.name} {self.manifest.recipe.name}"

    @property
    def fingerprint(self) -> str:
        """Of all that a state depends on: weights, graphs, tokenizer and chat template."""
        return self.manifest.fingerprint

    @property
    def head(self) -> HeadKind:
        """The one in use."""
        return self._head.kind

    @property
    def spec(self) -> ModelSpec:
        return self.manifest.spec

    @property
    def has_vision(self) -> bool:
        return self.spec.vision is not None

    def new_state(self, capacity: int = 2048) -> State:
        """An empty state for up to `capacity` tokens; it takes memory as it is filled. Of 0: a fork, to be lent to."""
        return State(self.spec, capacity)

    @overload
    def prefill(
        self, state: State, token_ids: Tokens, *, logits: Literal[True] = True, only: Ints | None = None
    ) -> Floats: ...
    @overload
    def prefill(self, state: State, token_ids: Tokens, *, logits: bool, only: Ints | None = None) -> Floats | None: ...
    def prefill(
        self, state: State, token_ids: Tokens, *, logits: bool = True, only: Ints | None = None
    ) -> Floats | None:
        """Read tokens, int64 [T]. Returns float32 [V] after the last of them, or None without `logits`.

        only: tokens int64 [n] of which alone one will be taken; others may have −∞. Raises ContextOverflow before
        anything is run. Any chunking of the same tokens gives the same state, but for the last bits of floating point.
        """
        return self._decoder.prefill(state, token_ids, logits=logits, only=only)

    def step(self, state: State, token_id: int) -> Floats:
        """Read one token. Returns float32 [V], which the next call overwrites."""
        return self._decoder.step(state, token_id)

    def logits_along(self, state: State, token_ids: Tokens) -> Floats:
        """Read tokens, int64 [T]. Returns float32 [T, V]: exact logits behind each of them; for measuring."""
        return self._decoder.logits_along(state, token_ids)

    def image_size(self, shape: tuple[int, ...], max_pixels: int | None = None) -> tuple[int, int]:
        """Height and width that an image of shape [H, W, …] is resized to.

        max_pixels: a bound for this image, which may lie below the smallest area that the checkpoint's processor makes.
        """
        return self._encoder().size(shape[0], shape[1], max_pixels)

    def image_grid(self, shape: tuple[int, ...], max_pixels: int | None = None) -> Grid:
        """Patches (t, h, w) of such an image, after its resize."""
        return self._encoder().grid(self.image_size(shape, max_pixels))

    def image_tokens(self, grid: Grid) -> int:
        """Tokens that an image of this grid takes."""
        return self._encoder().n_tokens(grid)

    def encode_image(self, rgb: RGB, size: tuple[int, int] | None = None) -> Floats:
        """uint8 [H, W, 3] → float32 [n, D]: resized, normalised and encoded as the checkpoint's processor does it.

        size: of `image_size`, where it is another than the processor's own.
        """
        return self._encoder().encode(rgb, size)

    def close_vision(self) -> None:
        """Give the memory of the vision graph back until the next image."""
        if self._vision is not None:
            self._vision.close()

    def prefill_embeddings(
        self, state: State, embeddings: Floats, *, grid: Grid, rows: slice = ALL, logits: bool = False
    ) -> Floats | None:
        """Read an image's embeddings, float32 [n, D], placing them with M-RoPE by its grid.

        `rows` reads a part of them; the parts must follow each other up to the last row, with nothing read between.
        Raises ContextOverflow or InvalidInput before anything is run.
        """
        offsets, span = self._encoder().rope_offsets(grid)
        if (wanted := (offsets.shape[1], self.spec.hidden_size)) != embeddings.shape:
            raise InvalidInput(f"embeddings of the grid {grid} are {list(wanted)}, not {list(embeddings.shape)}")
        last = rows.indices(len(embeddings))[1] == len(embeddings)
        part = embeddings[rows], offsets[:, rows]
        return self._decoder.prefill_embeddings(state, *part, span if last else 0, logits=logits)

    @cached_property
    def every_token(self) -> Ints:
        """int64 [V]: as `only`, for who needs all logits, not the largest alone."""
        return np.arange(self.spec.vocab_size)

    def label_paths(self, labels: Sequence[str]) -> list[LabelPath]:
        """The tokens of each label. Raises InvalidInput; see `iotd.model.labels.label_paths`."""
        return label_paths(labels, self.tokenizer, self._head.shortlist)

    def weighing(self, state: State, logits: Floats, labels: Labels, paths: Sequence[LabelPath]) -> Weighing:
        """Labels weighed as the beginning of the answer that goes on from `state`, one run of the model a step.

        logits: float32 [V] after its last token, of `every_token`. paths: of `label_paths`.
        """
        return Weighing(self._decoder, state, self._other_than(state), logits, labels, paths)

    def constraint(self, format: Format, max_tokens: int) -> Constraint:
        """For one answer of this form. From any thread; see `Grammars.constraint`."""
        return self._grammars.constraint(format, max_tokens)

    def generation(
        self,
        state: State,
        logits: Floats,
        sampling: Sampling,
        *,
        said: Iterable[int] | None = None,
        constraint: Constraint | None = None,
    ) -> Generation:
        """An answer that goes on from `state` and its last logits, one run of the model a step.

        `said` are the tokens that it may quote, such as those the state has read: several of them are then read in one
        run where they are guessed rightly. The text is the same, but for the last bits of floating point. The state it
        ends in (`Generation.state`) is then good until the next generation with `said`. With a constraint nothing is
        guessed: what it forces is read in one run as it is.
        """
        parts = self._decoder, state, logits, sampling, self.tokenizer.stream(), self.endings
        if constraint is not None:
            return ConstrainedGeneration(*parts, constraint)
        drafting = None if said is None else Drafting(Lookup(said), self._other_than(state))
        return Generation(*parts, drafting)

    def _other_than(self, state: State) -> State:
        """A state to run ahead in."""
        if self._beside is None or self._beside is state:
            self._beside = self.new_state(0)
        return self._beside

    def generate(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int = 64,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        presence_penalty: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] | str = (),
        thinking: bool = False,
        capacity: int | None = None,
    ) -> Iterator[str]:
        """Answer a conversation, yielding valid UTF-8 pieces of text. Thoughts are not among them; their tokens count.

        `messages` are those of the checkpoint's chat template; `content` is a text, or parts of type `text` and `image`
        (uint8 [H, W, 3]). Options that are None are those of Sampling; for thoughts, those of the model's card.
        `capacity` bounds prompt and answer together; by default it is what they need at most.
        Raises ContextOverflow before anything is run where the prompt does not fit, and InvalidInput for a message or
        an option that cannot be used.
        """
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        defaults = Sampling(seed=seed, max_tokens=max_tokens, stop=stops, thinking=thinking)
        options = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "presence_penalty": presence_penalty}
        given = {name: value for name, value in options.items() if value is not None}
        parts = self._parts(messages, thinking)
        sampling = sampling_of(defaults, given, images=not all(isinstance(part, list) for part in parts))
        needed = sum(self._n_tokens(part) for part in parts)
        if capacity is not None and needed > capacity:
            raise ContextOverflow(needed, capacity, field="messages")
        state = self.new_state(capacity or needed + max_tokens)
        return self._answer(state, parts, sampling)

    def _answer(self, state: State, parts: Sequence[list[int] | RGB], sampling: Sampling) -> Iterator[str]:
        logits: Floats | None = None
        for i, part in enumerate(parts):
            if isinstance(part, list):
                logits = self.prefill(state, part, logits=i + 1 == len(parts))
            else:
                self.prefill_embeddings(state, self.encode_image(part), grid=self.image_grid(part.shape))
        assert logits is not None  # a rendered prompt ends with the opening of the answer
        generation = self.generation(state, logits, sampling)
        while not generation.done:
            if piece := generation.step().answer:
                yield piece
        if piece := generation.flush().answer:
            yield piece

    def _parts(self, messages: Sequence[Message], thinking: bool) -> list[list[int] | RGB]:
        """The prompt as runs of token ids and images between them."""
        return self.chat.tokenize(self.chat.render(messages, thinking), self.tokenizer)

    def end_profile(self) -> Path:
        """The file, in Chrome's trace format, with all that the decoder has run since it was opened for profiling."""
        return self._decoder.end_profile()

    def _n_tokens(self, part: list[int] | RGB) -> int:
        if isinstance(part, list):
            return len(part)
        check_image(part)
        return self.image_tokens(self.image_grid(part.shape))

    def _encoder(self) -> VisionEncoder:
        if self._vision is None:
            raise InvalidInput(f"{self.name} was converted without vision: ask it without images", field="images")
        return self._vision
