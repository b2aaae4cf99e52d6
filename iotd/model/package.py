"""The model package on disk: its manifest, and the check that every file is the one that was written.

Knows nothing of graphs or tokens; `iotd.convert` writes the same manifest that this module reads.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from iotd.errors import PackageError
from iotd.model.spec import ModelSpec

FORMAT = 3
READ_FORMATS = (2, 3)
"""Format 2 keeps scales in 32 bits, and has no figures of quality."""
MANIFEST = "manifest.json"
DECODER = "decoder.onnx"
HEAD = "head.onnx"
COARSE_HEAD = "coarse-head.onnx"
HEAD_IDS = "head.ids"
VISION = "vision.onnx"
TOKENIZER = "tokenizer.bin"
CHAT = "chat.json"


Bits = Literal[4, 8, 32]
VisionBits = Literal[4, 8, 16, 32]
Block = Literal[16, 32, 64, 128, 256]
Offset = Annotated[int, msgspec.Meta(ge=0)]


MOST_KLD = 0.3
"""Nats from the original, above which a package says so: twice what the usual 4-bit files of small models take (0.10 to
0.15 for SmolLM2-135M in llama.cpp's Q4_K_M)."""


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    sha256: str
    nbytes: int


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """How the large matrices are stored. With 32 bits they stay float32; `block` is along the input axis."""

    name: str
    bits: Bits
    vision_bits: VisionBits
    """16: float16, multiplied in float32."""
    block: Block = 32
    calibrated: bool = False
    """Rounded so that what the matrices compute changes least; else each weight to the nearest level."""


class TableEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Where the rows of a matrix lie: `bits`-wide codes (or float32) and, for codes, one scale per block."""

    file: str
    bits: Bits
    block: Block
    scales: Literal["float32", "bfloat16"] = "float32"
    codes_offset: Offset
    scales_offset: Offset


Part = Annotated[float, msgspec.Meta(ge=0, le=1)]


class CoarseEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A coarse head, and what conversion found of it on hidden states that it was not made of."""

    rank: Annotated[int, msgspec.Meta(ge=1)]
    candidates: Annotated[int, msgspec.Meta(ge=1)]
    """Tokens whose exact logits it asks for."""
    deviations: Annotated[float, msgspec.Meta(ge=0)]
    """Of what its logits of the candidates are off by, that those of other tokens are taken to be off by at most."""
    n_states: int
    fallback: Part
    """Of the states, those in which it could not be sure. What follows is about the others."""
    argmax: Part
    """How often the likeliest token was the exact head's."""
    top20: Part
    """Of the exact head's 20 likeliest tokens, those that were candidates."""
    kl: float
    """Mean Kullback-Leibler divergence from the exact head's distribution that is drawn from (temperature 0.7, top_k
    20) to this head's, in nats, over all states; a token that this head cannot draw counts with 1e-6."""


class HeadEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The matrix that makes logits of hidden states: the first `rows` of the table."""

    rows: Annotated[int, msgspec.Meta(ge=1)]
    """One for each token that has a logit: all of them, or those that HEAD_IDS lists."""
    table: TableEntry
    coarse: CoarseEntry | None = None
    exact_because: str = ""
    """Why the coarse head is not to be used unless it is asked for, or why there is none; empty where it is."""


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """How near a package is to its float32 original, on texts of one kind that calibration did not see."""

    kind: str
    n_tokens: int
    kld_mean: float
    """Kullback-Leibler divergence of the next token's distribution, in nats."""
    kld_median: float
    kld_p99: float
    top1: float
    """Part of the tokens at which the likeliest one is the same."""
    ppl: float
    """Perplexity; `ppl_float` is that of the original."""
    ppl_float: float


class Source(msgspec.Struct, frozen=True, kw_only=True):
    repo: str
    revision: str = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    tool: str
    name: str
    source: Source
    recipe: Recipe
    spec: ModelSpec
    embedding: TableEntry
    head: HeadEntry
    files: dict[str, FileEntry]
    quality: tuple[Quality, ...] = ()
    """Measured at conversion; empty where it was not."""

    @property
    def kld(self) -> float | None:
        """Mean over the kinds of text, in nats."""
        return sum(one.kld_mean for one in self.quality) / len(self.quality) if self.quality else None

    @property
    def poor(self) -> str:
        """What is wrong with a package that is far from its original; empty where nothing is, or nothing is known."""
        if self.kld is None or self.kld <= MOST_KLD:
            return ""
        return f"it diverges by {self.kld:.2f} nats on texts held back at its conversion, where {MOST_KLD} is much"

    @property
    def fingerprint(self) -> str:
        """SHA-256, hexadecimal: the same for packages that compute the same, whatever they are called."""
        computes = (self.format, self.spec, self.embedding, self.head, self.files)
        return hashlib.sha256(msgspec.json.encode(computes)).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, readable by a person."""
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (folder / MANIFEST).write_bytes(text + b"\n")


def hash_file(path: Path) -> FileEntry:
    """SHA-256 and size of a file, read in pieces."""
    with path.open("rb") as file:
        return FileEntry(sha256=hashlib.file_digest(file, "sha256").hexdigest(), nbytes=path.stat().st_size)


def read_manifest(folder: Path) -> Manifest:
    """Read and check a package's manifest; file sizes are compared, hashes are not.

    Raises PackageError where the folder is no package, was written in another format, or a file has the wrong size.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PackageError(
            f"{folder} is not a model package ({error.strerror}: {MANIFEST}): make one with `iotd convert`"
        ) from error
    _check_format(folder, raw)
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except ValueError as error:  # msgspec's own errors, and what is no UTF-8
        raise PackageError(f"{path} is damaged: {error}; convert the checkpoint again") from error
    for name in _needed(manifest) - manifest.files.keys():
        raise PackageError(f"{path} is damaged: it lists no {name}; convert the checkpoint again")
    for name, entry in manifest.files.items():
        _check_size(folder / name, entry)
    return manifest


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare every file's SHA-256 with the manifest, once per install: a good result is remembered by size and mtime.

    Raises PackageError naming the first file that differs.
    """
    stamp = _stamp(folder, manifest)
    marker = cache_folder() / f"verified-{stamp[:32]}"
    if os.path.exists(marker):  # noqa: PTH110 - Path.exists raises where a folder above may not be read
        return
    for name, entry in manifest.files.items():
        _check_hash(folder / name, entry)
    with suppress(OSError):  # nowhere to remember it: the next start hashes again
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()


def _check_format(folder: Path, raw: bytes) -> None:
    class Versioned(msgspec.Struct):
        format: int

    try:
        found = msgspec.json.decode(raw, type=Versioned).format
    except ValueError as error:
        raise PackageError(f"{folder / MANIFEST} is damaged: {error}; convert the checkpoint again") from error
    if found not in READ_FORMATS:
        raise PackageError(
            f"{folder} has package format {found}, this iotd reads {' and '.join(map(str, READ_FORMATS))}; "
            "convert the checkpoint again"
        )


def _check_size(path: Path, entry: FileEntry) -> None:
    try:
        nbytes = path.stat().st_size
    except OSError as error:
        raise PackageError(f"{path} is missing; convert or copy the package again") from error
    if nbytes != entry.nbytes:
        raise PackageError(f"{path} has {nbytes} bytes, its manifest says {entry.nbytes}; convert or copy it again")


def _check_hash(path: Path, entry: FileEntry) -> None:
    try:
        found = hash_file(path).sha256
    except OSError as error:
        raise PackageError(f"cannot read {path}: {error.strerror}") from error
    if found != entry.sha256:
        raise PackageError(f"{path} is damaged (its SHA-256 is not the manifest's); convert or copy it again")


def _needed(manifest: Manifest) -> set[str]:
    """Files that no package of this kind is without."""
    needed = {DECODER, HEAD, TOKENIZER, CHAT, manifest.embedding.file, manifest.head.table.file}
    if manifest.head.coarse is not None:
        needed.add(COARSE_HEAD)
    if manifest.head.rows != manifest.spec.vocab_size:
        needed.add(HEAD_IDS)
    return needed | ({VISION} if manifest.spec.vision else set())


def _stamp(folder: Path, manifest: Manifest) -> str:
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for name, entry in sorted(manifest.files.items()):
        stat = (folder / name).stat()
        digest.update(f"{name} {entry.sha256} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}\n".encode())
    return digest.hexdigest()


def cache_folder() -> Path:
    """systemd's CACHE_DIRECTORY, else the XDG cache."""
    if folder := os.environ.get("CACHE_DIRECTORY"):
        return Path(folder.split(":")[0])
    # Unlike Path.home, expanduser does not raise for a user without a home.
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "iotd"  # noqa: PTH111
