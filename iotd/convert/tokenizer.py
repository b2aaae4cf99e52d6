"""A checkpoint's tokenizer.json to the one file that `iotd.model.tokenizer` maps.

Takes byte-level BPE as Qwen uses it and refuses everything the runtime would do differently.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from iotd.convert.checkpoint import read_json
from iotd.convert.unicode_tables import character_classes, normalized_ranges
from iotd.errors import CheckpointError
from iotd.model.pretokenizer import PATTERNS, QWEN3_5
from iotd.model.tokenizer import Tokenizer
from iotd.model.tokenizer_file import Array, write_tokenizer_file

Document = Mapping[str, Any]

_PROBES = (
    "Küche: 23.4 °C, It's 7:05\r\n\n  naïve cafe\u0301 \ufb01",
    "你好,世界 Привет мир, नमस्ते दुनिया, สวัสดี, 안녕하세요 👩\u200d👧 \u1ab0\u0316",
    "def f(x):\n\treturn x  # \u00a0 ١٢٣ \u2177 ''LL '\u017f <|im_start|><think>",
)


def compile_tokenizer(source: Path | Document, out: Path) -> None:
    """Write `out`, the runtime's form of a tokenizer.json (its path, or the document itself).

    Raises CheckpointError, which names the part, where the document is no byte-level BPE that the runtime knows, and
    where the runtime disagrees with the `tokenizers` library on a few probes.
    """
    document = source if isinstance(source, Mapping) else read_json(source)
    _check_model(document)
    _check_normalizer(document)
    _check_post_processor(document)
    pattern = _pattern_name(document)
    vocabulary = _vocabulary(document)
    added = _added_tokens(document, vocabulary)
    tokens = {**vocabulary, **{token["content"]: token["id"] for token in added}}
    write_tokenizer_file(out, {"pattern": pattern, "added": added}, _tables(document, vocabulary, tokens))
    _check_agreement(document, Tokenizer.open(out))


def byte_tokenizer_json(specials: Mapping[str, int], vocab_size: int) -> dict[str, Any]:
    """A tokenizer.json of the 256 bytes without a merge, for packages of random weights.

    specials: control tokens with their ids. The bytes take the lowest ids that these leave free. Raises CheckpointError
    where ids repeat, or do not fit below `vocab_size`.
    """
    taken = set(specials.values())
    free = [token for token in range(256 + len(specials)) if token not in taken][:256]
    if len(taken) != len(specials) or max(*taken, *free) >= vocab_size:
        raise CheckpointError(f"256 bytes and the control tokens {dict(specials)} need distinct ids below {vocab_size}")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": QWEN3_5}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    letters = dict(zip((_letter(byte) for byte in range(256)), free, strict=True))
    return {
        "version": "1.0",
        "added_tokens": [{"id": token, "content": content, **flags} for content, token in specials.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {**letters, **specials}, "merges": []},
    }


def _require(condition: bool, part: str, value: object, known: str) -> None:
    if not condition:
        raise CheckpointError(f"tokenizer.json: {part} {json.dumps(value)[:300]} is not supported, only {known} is")


def _check_model(document: Document) -> None:
    model = document.get("model")
    if not isinstance(model, Mapping) or not model.get("vocab") or "merges" not in model:
        raise CheckpointError("tokenizer.json: model has no vocabulary or no merges: only byte-level BPE is supported")
    _require(model.get("type", "BPE") == "BPE", "model.type", model.get("type"), "BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        _require(not model.get(key), f"model.{key}", model.get(key), "none")


def _check_normalizer(document: Document) -> None:
    _require(document.get("normalizer") == {"type": "NFC"}, "normalizer", document.get("normalizer"), "NFC")


def _check_post_processor(document: Document) -> None:
    """Nothing may be put around a text: what a conversation needs, the chat template writes."""
    processor = document.get("post_processor") or {"type": "ByteLevel"}
    adds_nothing = processor.get("type") == "ByteLevel" or (
        processor.get("type") == "TemplateProcessing"
        and processor.get("single") == [{"Sequence": {"id": "A", "type_id": 0}}]
    )
    _require(adds_nothing, "post_processor", processor, "one that adds no token")
    decoder = document.get("decoder") or {}
    _require(decoder.get("type") == "ByteLevel", "decoder", decoder, "ByteLevel")


def _pattern_name(document: Document) -> str:
    pre_tokenizer = document.get("pre_tokenizer") or {}
    match pre_tokenizer.get("pretokenizers"):
        case [
            {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            names = [name for name, pattern in PATTERNS.items() if pattern == regex]
            _require(bool(names), "the pre-tokenizer's pattern", regex, " or ".join(f"that of {n}" for n in PATTERNS))
            return names[0]
        case _:
            _require(False, "pre_tokenizer", pre_tokenizer, "an isolating Split followed by ByteLevel")
            raise AssertionError


def _vocabulary(document: Document) -> dict[str, int]:
    vocabulary: dict[str, int] = document["model"]["vocab"]
    ids = set(vocabulary.values())
    if len(ids) != len(vocabulary) or not all(isinstance(token, int) and token >= 0 for token in ids):
        raise CheckpointError("tokenizer.json: model.vocab gives one id to two tokens, or one that is no whole number")
    missing = [byte for byte in range(256) if _letter(byte) not in vocabulary]
    if missing:
        raise CheckpointError(
            f"tokenizer.json: model.vocab has no token for the bytes {missing[:8]}: no byte-level BPE"
        )
    return vocabulary


def _added_tokens(document: Document, vocabulary: Mapping[str, int]) -> list[dict[str, Any]]:
    by_id = {token: content for content, token in vocabulary.items()}
    added = []
    for token in document.get("added_tokens") or []:
        content, number = token["content"], token["id"]
        for flag in ("lstrip", "rstrip", "single_word", "normalized"):
            _require(not token.get(flag), f"{flag} of the added token {content!r}", True, "false")
        if vocabulary.get(content, number) != number or by_id.setdefault(number, content) != content or not content:
            raise CheckpointError(f"tokenizer.json: the added token {content!r} has id {number}, which is another's")
        added.append({"id": number, "content": content, "special": bool(token.get("special"))})
    return sorted(added, key=lambda token: int(token["id"]))


def _tables(document: Document, vocabulary: Mapping[str, int], tokens: Mapping[str, int]) -> dict[str, Array]:
    n_ids = max(tokens.values()) + 1
    contents = [b""] * n_ids
    for content, token in tokens.items():
        contents[token] = _token_bytes(content)
    class_starts, class_kinds = character_classes()
    nfc_starts, nfc_ends = normalized_ranges()
    return {
        "byte_ids": np.array([vocabulary[_letter(byte)] for byte in range(256)], np.uint32),
        "token_offsets": np.cumsum([0, *map(len, contents)], dtype=np.uint32),
        "token_bytes": np.frombuffer(b"".join(contents), np.uint8),
        **_merge_tables(document["model"]["merges"], vocabulary, n_ids),
        "class_starts": class_starts,
        "class_kinds": class_kinds,
        "nfc_starts": nfc_starts,
        "nfc_ends": nfc_ends,
    }


def _merge_tables(merges: list[Any], vocabulary: Mapping[str, int], n_ids: int) -> dict[str, NDArray[np.uint32]]:
    products = np.zeros(len(merges), np.uint32)
    ranks: dict[tuple[int, int], int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        try:
            # A pair that is listed twice counts where it stands last, as in the reference.
            ranks[vocabulary[left], vocabulary[right]] = rank
            products[rank] = vocabulary[left + right]
        except KeyError as error:
            raise CheckpointError(
                f"tokenizer.json: merge {rank} ({merge!r}) needs {error}, not in model.vocab"
            ) from None
    pairs = np.array(sorted(ranks), np.uint32).reshape(-1, 2)
    return {
        "merge_starts": np.searchsorted(pairs[:, 0], np.arange(n_ids + 1)).astype(np.uint32),
        "merge_rights": np.ascontiguousarray(pairs[:, 1]),
        "merge_ranks": np.array([ranks[pair] for pair in sorted(ranks)], np.uint32),
        "merge_products": products,
    }


def _check_agreement(document: Document, tokenizer: Tokenizer) -> None:
    try:
        reference = tokenizers.Tokenizer.from_str(json.dumps(document))
    except Exception as error:
        raise CheckpointError(f"tokenizer.json is refused by the tokenizers library: {error}") from error
    contents = [token["content"] for token in document.get("added_tokens") or []]
    for content in contents:
        # The library numbers added tokens itself, and one that leaves a gap before its id gets another.
        if (found := reference.token_to_id(content)) != tokenizer.token_id(content):
            raise CheckpointError(f"tokenizer.json: the tokenizers library gives {content!r} another id, {found}")
    for text in (*_PROBES, "".join(contents)):
        ids = reference.encode(text, add_special_tokens=False).ids
        if tokenizer.encode(text, special=True) != ids or tokenizer.decode(ids) != reference.decode(ids):
            raise CheckpointError(f"tokenizer.json: the runtime's tokenizer disagrees with the reference on {text!r}")


def _letter(byte: int) -> str:
    return _LETTERS[byte]


def _byte_letters() -> list[str]:
    """The byte-level alphabet of GPT-2: printable Latin-1 stands for itself, the other bytes for U+0100 onward."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_LETTERS = _byte_letters()
_BYTES = {letter: byte for byte, letter in enumerate(_LETTERS)}


def _token_bytes(content: str) -> bytes:
    """A token in another alphabet than the byte-level one is its own UTF-8, as the reference decodes it."""
    try:
        return bytes(_BYTES[letter] for letter in content)
    except KeyError:
        return content.encode()
