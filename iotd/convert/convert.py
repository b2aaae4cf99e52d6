"""Conversion from a checkpoint to a model package: written beside its place, then renamed: none is half done."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from iotd import __version__
from iotd.convert import random
from iotd.convert.balance import Balanced
from iotd.convert.beside import beside, work_folder
from iotd.convert.calibrate import Calibrated, Calibrator
from iotd.convert.chat import compile_chat
from iotd.convert.checkpoint import Checkpoint
from iotd.convert.coarse import MEASURED_STATES, HiddenStates
from iotd.convert.decoder import DecoderWriter
from iotd.convert.graph import GraphWriter
from iotd.convert.head import head_matrix, write_head
from iotd.convert.quality import by_kind, compare, float_logits
from iotd.convert.rounding import EMBEDDING, Nearest, Rounding
from iotd.convert.samples import Texts, sequences
from iotd.convert.shortlist import Choice
from iotd.convert.spec import spec_from_config
from iotd.convert.stack import TextStack
from iotd.convert.tokenizer import compile_tokenizer
from iotd.convert.vision import VisionWriter
from iotd.convert.weights import CheckpointWeights, Progress, Weights
from iotd.errors import CheckpointError
from iotd.model.chat import ChatTemplate
from iotd.model.package import (
    CHAT,
    DECODER,
    FORMAT,
    HEAD,
    TOKENIZER,
    VISION,
    HeadEntry,
    Manifest,
    Quality,
    Recipe,
    Source,
    TableEntry,
    hash_file,
    write_manifest,
)
from iotd.model.session import Threads, open_session
from iotd.model.spec import ModelSpec
from iotd.model.tokenizer import Tokenizer

Floats = NDArray[np.float32]
RECIPES = {
    "int4": Recipe(name="int4", bits=4, vision_bits=16, block=32),
    "int4-64": Recipe(name="int4-64", bits=4, vision_bits=16, block=64),
    "int4-128": Recipe(name="int4-128", bits=4, vision_bits=16, block=128),
    "int8": Recipe(name="int8", bits=8, vision_bits=16),
    "fp32": Recipe(name="fp32", bits=32, vision_bits=32),
}
PASSES = 4
"""Times the conversion of a matrix that its calibration takes, about: for the progress."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a package is made of, wherever it comes from."""

    name: str
    source: Source
    config: dict[str, Any]
    folder: Path | None
    """Where the tokenizer and the chat template lie; None makes those of a random package."""
    weights: Callable[[Progress], Weights]
    tied: bool
    vision: bool
    stamp: str
    """Tells weights from others."""
    n_elements: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """What 4-bit matrices are rounded by."""

    n_tokens: int = 8192
    """Of the project's own texts, which are held against a quarter as many others."""
    seed: int = 0
    own: tuple[str, ...] = ()
    """The user's lines, as the context has them; they take a third of the tokens."""


THOROUGH = Calibration()


def convert_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    recipe: str = "int4",
    vision: bool = True,
    shortlist: Choice | None = None,
    calibration: Calibration | None = None,
    source: Source | None = None,
    progress: Progress = lambda _: None,
) -> Manifest:
    """Convert the folder `checkpoint` into a new package at `out`. `progress` is told the elements read.

    shortlist: chooses the tokens that answers are made of, such as `shortlist.of_languages`; all of them by default.
    calibration: the texts that 4-bit matrices are rounded by; None rounds each weight to the nearest level. What is
    interrupted goes on where it was when it is called again with the same arguments.

    Raises CheckpointError where the checkpoint cannot be converted, where `out` is something else than an older
    package, or where there is no space left.
    """
    opened = Checkpoint(checkpoint)
    source = source or Source(repo=opened.name)
    origin = Origin(
        name=source.repo.rpartition("/")[2],
        source=source,
        config=opened.config,
        folder=checkpoint,
        weights=partial(CheckpointWeights, opened),
        tied=_shares_its_head(opened),
        vision=vision and bool(opened.config.get("vision_config")),
        stamp=opened.stamp,
        n_elements=opened.n_elements,
    )
    return _Conversion(origin, RECIPES[recipe], calibration, shortlist, progress).run(out)


def convert_random(
    size: str,
    out: Path,
    *,
    recipe: str = "int4",
    vision: bool = True,
    shortlist: Choice | None = None,
    calibration: Calibration | None = None,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> Manifest:
    """Write a package of random weights with the shape of a published model, one of `random.N_PARAMETERS`."""
    config = random.random_config(size)
    origin = Origin(
        name=f"random-{size}",
        source=Source(repo="random", revision=f"seed {seed}"),
        config=config,
        folder=None,
        weights=partial(random.RandomWeights, seed),
        tied=config["text_config"]["tie_word_embeddings"],
        vision=vision,
        stamp=f"random {size} {seed}",
        n_elements=random.N_PARAMETERS[size],
    )
    return _Conversion(origin, RECIPES[recipe], calibration, shortlist, progress).run(out)


def open_stack(checkpoint: Path) -> TextStack:
    """The text model of a checkpoint, layer by layer. Raises CheckpointError."""
    opened = Checkpoint(checkpoint)
    spec = spec_from_config(opened.config, checkpoint, tied=_shares_its_head(opened), vision=False)
    return TextStack(spec, CheckpointWeights(opened, _unheard))


def n_steps(n_elements: int, recipe: str, calibration: Calibration | None) -> int:
    """What the progress of a conversion adds up to."""
    return n_elements * (1 + PASSES * (_calibrates(RECIPES[recipe], calibration)))


def _unheard(_n_elements: int) -> None:
    """Progress that nobody is told of."""


def _calibrates(recipe: Recipe, calibration: Calibration | None) -> bool:
    return calibration is not None and recipe.bits == 4


class _Conversion:
    """One conversion, from its origin to the manifest."""

    def __init__(
        self, origin: Origin, recipe: Recipe, calibration: Calibration | None, choose: Choice | None, progress: Progress
    ) -> None:
        self._origin = origin
        self._calibration = calibration if _calibrates(recipe, calibration) else None
        self._recipe = msgspec.structs.replace(recipe, calibrated=self._calibration is not None)
        self._choose = choose
        self._progress = progress

    def run(self, out: Path) -> Manifest:
        origin = self._origin
        spec = spec_from_config(origin.config, origin.folder, tied=origin.tied, vision=origin.vision)
        with beside(out) as folder:
            spec = _write_text(folder, spec, origin)
            shortlist = None if self._choose is None else _shortlist(self._choose, folder, spec)
            if self._calibration is None:
                hidden = _noise(spec.hidden_size) if self._measured_only else None
                tables = self._write_graphs(folder, spec, Nearest(self._recipe), shortlist, hidden)
                return self._write_manifest(folder, spec, *tables)
            with work_folder(out, self._plan()) as work:
                texts = self._texts(folder, self._calibration)
                found = self._calibrate(spec, texts, work)
                n_fit = sum(len(text.ids) for text in texts.fit)
                hidden = HiddenStates(found.hidden[:n_fit], found.hidden[n_fit:])
                tables = self._write_graphs(folder, spec, found.rounding, shortlist, hidden)
                figures = self._quality(folder, spec, texts, found.reference[n_fit:], hidden.held, shortlist)
                return self._write_manifest(folder, spec, *tables, figures)

    @property
    def _measured_only(self) -> bool:
        """Random weights say nothing, whatever head says it."""
        return self._origin.folder is None

    def _texts(self, folder: Path, calibration: Calibration) -> Texts:
        tokenizer = Tokenizer.open(folder / TOKENIZER)
        chat = ChatTemplate.from_json((folder / CHAT).read_bytes())
        return sequences(tokenizer, chat, n_tokens=calibration.n_tokens, seed=calibration.seed, extra=calibration.own)

    def _calibrate(self, spec: ModelSpec, texts: Texts, work: Path) -> Calibrated:
        steps = PASSES * self._origin.n_elements
        ids = [text.ids for text in (*texts.fit, *texts.held)]
        stack = TextStack(spec, self._weights(spec))
        advance = lambda part: self._progress(round(part * steps))  # noqa: E731
        return Calibrator(stack, ids, len(texts.fit), self._recipe, work, advance).run()

    def _quality(
        self,
        folder: Path,
        spec: ModelSpec,
        texts: Texts,
        reference: Floats,
        found: Floats,
        shortlist: Sequence[int] | None,
    ) -> tuple[Quality, ...]:
        """Of the layers as they were calibrated and the head as it was written, on the texts that were held back.

        reference, found: the hidden states of those, float32 [n, D], of the original and of the quantised layers.
        """
        session = open_session(folder / HEAD, Threads.of_all_cores())
        held = [(text.kind, text.ids if shortlist is None else _at(text.ids, shortlist)) for text in texts.held]
        exact = float_logits(head_matrix(spec, self._weights(spec), shortlist))
        parts = compare(held, reference, found, exact, lambda x: session.run(["logits"], {"hidden": x})[0])
        return tuple(by_kind(parts))

    def _weights(self, spec: ModelSpec, progress: Progress = _unheard) -> Weights:
        weights = self._origin.weights(progress)
        return weights if self._calibration is None else Balanced(weights, spec)

    def _write_graphs(
        self,
        folder: Path,
        spec: ModelSpec,
        rounding: Rounding,
        shortlist: Sequence[int] | None,
        hidden: HiddenStates | None,
    ) -> tuple[TableEntry, HeadEntry]:
        """Returns where the rows of embedding and head lie, which are the same where they are tied."""
        weights = self._weights(spec, self._progress)
        head = write_head(folder, spec, weights, rounding, shortlist, hidden, keep=self._measured_only)
        embedding = head.table
        with GraphWriter(folder / DECODER, rounding) as graph:
            DecoderWriter(graph, spec, weights).write()
            if not spec.tied:
                table = weights.matrix(f"{EMBEDDING}.weight", spec.vocab_size, spec.hidden_size)
                embedding = graph.table(EMBEDDING, table)
        if spec.vision is not None:
            with GraphWriter(folder / VISION, rounding) as graph:
                VisionWriter(graph, spec.vision, spec.hidden_size, weights).write()
        return embedding, head

    def _write_manifest(
        self,
        folder: Path,
        spec: ModelSpec,
        embedding: TableEntry,
        head: HeadEntry,
        quality: tuple[Quality, ...] = (),
    ) -> Manifest:
        manifest = Manifest(
            format=FORMAT,
            tool=f"iotd {__version__}",
            name=self._origin.name,
            source=self._origin.source,
            recipe=self._recipe,
            spec=spec,
            embedding=embedding,
            head=head,
            files={path.name: hash_file(path) for path in sorted(folder.iterdir())},
            quality=quality,
        )
        write_manifest(folder, manifest)
        return manifest

    def _plan(self) -> str:
        """All that calibration depends on."""
        parts = (__version__, np.__version__, self._origin.stamp, self._recipe, self._calibration)
        return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()


def _shortlist(choose: Choice, folder: Path, spec: ModelSpec) -> list[int]:
    """With the tokens that end an answer, which a checkpoint's config may name and its tokenizer not know."""
    return sorted({*choose(Tokenizer.open(folder / TOKENIZER)), *spec.eos_token_ids})


def _noise(hidden_size: int) -> HiddenStates:
    """What stands for the hidden states of random weights."""
    states = np.random.default_rng(0).standard_normal((2 * MEASURED_STATES, hidden_size)).astype(np.float32)
    return HiddenStates(states, states[MEASURED_STATES:])


def _at(ids: NDArray[np.int64], shortlist: Sequence[int]) -> NDArray[np.int64]:
    """Where each token stands on the shortlist; −1 of one that does not."""
    listed = np.asarray(shortlist)
    found = np.searchsorted(listed, ids).clip(max=len(listed) - 1)
    return np.where(listed[found] == ids, found, -1)


def _shares_its_head(checkpoint: Checkpoint) -> bool:
    """Whether the embedding is the head too: it has no weights of its own, and config.json does not promise any."""
    if checkpoint.has("head.weight"):
        return False
    sections = [checkpoint.config, checkpoint.config.get("text_config")]
    said = [section.get("tie_word_embeddings") for section in sections if isinstance(section, dict)]
    if False in said and True not in said:
        raise CheckpointError("the checkpoint lacks tensor lm_head.weight, and config.json says it is not tied")
    return True


def _write_text(folder: Path, spec: ModelSpec, origin: Origin) -> ModelSpec:
    """The tokenizer and the chat's pieces. Returns the spec with every id that ends a turn."""
    if origin.folder is None:
        compile_tokenizer(random.random_tokenizer_json(spec.vocab_size), folder / TOKENIZER)
        chat = compile_chat(None)
    else:
        compile_tokenizer(origin.folder / "tokenizer.json", folder / TOKENIZER)
        chat = compile_chat(origin.folder, **_image_pad(folder, origin.config))
    (folder / CHAT).write_bytes(chat.to_json())
    return msgspec.structs.replace(spec, eos_token_ids=_ends(Tokenizer.open(folder / TOKENIZER), spec, chat))


def _ends(tokenizer: Tokenizer, spec: ModelSpec, chat: ChatTemplate) -> tuple[int, ...]:
    """Ids that end a turn: those of config.json, which may name the end of a text only, and the template's own."""
    if tokenizer.vocab_size > spec.vocab_size:
        raise CheckpointError(
            f"tokenizer.json has ids up to {tokenizer.vocab_size - 1}, the embedding {spec.vocab_size} rows: "
            "they are not of one checkpoint"
        )
    ends = [*spec.eos_token_ids]
    for token in tokenizer.encode(chat.assistant.after, special=True)[:1]:
        if tokenizer.token_id(_content(tokenizer, token)) == token:  # a control token, and not any word
            ends.append(token)
    if not ends:
        raise CheckpointError("neither config.json nor the chat template names a token that ends an answer")
    return tuple(dict.fromkeys(ends))


def _image_pad(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The text of the token that config.json has stand for an image, where it names one."""
    token_id = config.get("image_token_id")
    content = _content(Tokenizer.open(folder / TOKENIZER), token_id) if isinstance(token_id, int) else ""
    return {"image_pad": content} if content else {}


def _content(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.token_bytes(token).decode(errors="replace")
