"""Conversion from a checkpoint to a model package: written beside its place, then renamed: none is half done."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from iotd import __version__
from iotd.convert import random
from iotd.convert.beside import beside
from iotd.convert.chat import compile_chat
from iotd.convert.checkpoint import Checkpoint
from iotd.convert.decoder import DecoderWriter
from iotd.convert.graph import GraphWriter
from iotd.convert.head import write_head
from iotd.convert.shortlist import Choice
from iotd.convert.spec import spec_from_config
from iotd.convert.tokenizer import compile_tokenizer
from iotd.convert.vision import VisionWriter
from iotd.convert.weights import CheckpointWeights, Progress, Weights
from iotd.errors import CheckpointError
from iotd.model.chat import ChatTemplate
from iotd.model.package import (
    CHAT,
    DECODER,
    FORMAT,
    TOKENIZER,
    VISION,
    HeadEntry,
    Manifest,
    Recipe,
    Source,
    TableEntry,
    hash_file,
    write_manifest,
)
from iotd.model.spec import ModelSpec
from iotd.model.tokenizer import Tokenizer

RECIPES = {
    "int4": Recipe(name="int4", bits=4, vision_bits=8, block=128),
    "int8": Recipe(name="int8", bits=8, vision_bits=8),
    "fp32": Recipe(name="fp32", bits=32, vision_bits=32),
}


@dataclass(frozen=True, slots=True)
class Origin:
    """What a package is made of, wherever it comes from."""

    name: str
    source: Source
    config: dict[str, Any]
    folder: Path | None
    """Where the tokenizer and the chat template lie; None makes those of a random package."""
    weights: Weights
    tied: bool
    vision: bool


def convert_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    recipe: str = "int4",
    vision: bool = True,
    shortlist: Choice | None = None,
    source: Source | None = None,
    progress: Progress = lambda _: None,
) -> Manifest:
    """Convert the folder `checkpoint` into a new package at `out`. `progress` is told the elements read.

    shortlist: chooses the tokens that answers are made of, such as `shortlist.of_languages`; all of them by default.

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
        weights=CheckpointWeights(opened, progress),
        tied=_shares_its_head(opened),
        vision=vision and bool(opened.config.get("vision_config")),
    )
    return _convert(origin, out, RECIPES[recipe], shortlist)


def convert_random(
    size: str,
    out: Path,
    *,
    recipe: str = "int4",
    vision: bool = True,
    shortlist: Choice | None = None,
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
        weights=random.RandomWeights(seed, progress),
        tied=config["text_config"]["tie_word_embeddings"],
        vision=vision,
    )
    return _convert(origin, out, RECIPES[recipe], shortlist)


def _convert(origin: Origin, out: Path, recipe: Recipe, choose: Choice | None) -> Manifest:
    spec = spec_from_config(origin.config, origin.folder, tied=origin.tied, vision=origin.vision)
    with beside(out) as folder:
        spec = _write_text(folder, spec, origin)
        shortlist = None if choose is None else _shortlist(choose, folder, spec)
        embedding, head = _write_graphs(folder, spec, origin.weights, recipe, shortlist)
        manifest = Manifest(
            format=FORMAT,
            tool=f"iotd {__version__}",
            name=origin.name,
            source=origin.source,
            recipe=recipe,
            spec=spec,
            embedding=embedding,
            head=head,
            files={path.name: hash_file(path) for path in sorted(folder.iterdir())},
        )
        write_manifest(folder, manifest)
    return manifest


def _shortlist(choose: Choice, folder: Path, spec: ModelSpec) -> list[int]:
    """With the tokens that end an answer, which a checkpoint's config may name and its tokenizer not know."""
    return sorted({*choose(Tokenizer.open(folder / TOKENIZER)), *spec.eos_token_ids})


def _write_graphs(
    folder: Path, spec: ModelSpec, weights: Weights, recipe: Recipe, shortlist: Sequence[int] | None
) -> tuple[TableEntry, HeadEntry]:
    """Returns where the rows of embedding and head lie, which are the same where the head has a row for each token."""
    head = write_head(folder, spec, weights, recipe, shortlist)
    embedding = head.table
    with GraphWriter(folder / DECODER, bits=recipe.bits, block=recipe.block) as graph:
        DecoderWriter(graph, spec, weights).write()
        if not spec.tied or shortlist is not None:
            table = weights.matrix("text.embed_tokens.weight", spec.vocab_size, spec.hidden_size)
            embedding = graph.table("text.embed_tokens", table)
    if spec.vision is not None:
        with GraphWriter(folder / VISION, bits=recipe.vision_bits, block=recipe.block) as graph:
            VisionWriter(graph, spec.vision, spec.hidden_size, weights).write()
    return embedding, head


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
