"""The runtime's tokenizer against the `tokenizers` library, on a small byte-level BPE trained here."""

import copy
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Reference

from iotd.convert.tokenizer import byte_tokenizer_json, compile_tokenizer
from iotd.convert.unicode_tables import character_classes, normalized_ranges
from iotd.errors import CheckpointError, PackageError
from iotd.model.normalizer import Normalizer
from iotd.model.pretokenizer import PATTERNS, Pretokenizer
from iotd.model.tokenizer import Tokenizer

CORPUS = """
[14:03:05] kitchen temperature 23.4 °C and the garden door is open; it's the 3rd time since we'll have left.
The hottest room is the kitchen, the coldest one the cellar. Nobody's been there since 07:15, they'd said so.
Die Küche ist wärmer als der Keller: 21,5 °C gegen 14,2 °C. Die Tür steht offen, es zieht.
Кухня теплее подвала, дверь открыта, температура двадцать один градус. Никого нет дома с утра.
Η κουζίνα είναι ζεστή και η πόρτα είναι ανοιχτή από το πρωί.
厨房的温度是二十三度，花园的门开着。地下室最冷，没有人在家。
台所の温度は二十三度です。庭のドアが開いています。
부엌 온도는 이십삼 도이고 정원 문이 열려 있습니다.
रसोई का तापमान तेईस डिग्री है और दरवाज़ा खुला है।
อุณหภูมิในครัวยี่สิบสามองศา ประตูสวนเปิดอยู่
درجة الحرارة في المطبخ ثلاث وعشرون درجة والباب مفتوح
def read(sensor):\n    if sensor.value > 20.5:\n        return {"open": True}\r\n\t// 👍🏽 👩‍👩‍👧 ok\n\n\n
"""
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>")
PLAIN_ADDED = ("<think>", "</think>", "<|im_")
Document = dict[str, Any]


def trained(pattern: str = "qwen3.5") -> Document:
    """A tokenizer.json of a few hundred merges."""
    reference = Reference(models.BPE())
    reference.normalizer = normalizers.NFC()
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    reference.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, initial_alphabet=alphabet)
    reference.train_from_iterator([CORPUS, CORPUS], trainer)
    reference.add_tokens([AddedToken(content, normalized=False, special=True) for content in CONTROL])
    reference.add_tokens([AddedToken(content, normalized=False) for content in PLAIN_ADDED])
    document: Document = json.loads(reference.to_str())
    return document


DOCUMENT = trained()
REFERENCE = Reference.from_str(json.dumps(DOCUMENT))
PLAIN_REFERENCE = Reference.from_str(json.dumps({**DOCUMENT, "added_tokens": []}))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return compiled(DOCUMENT, tmp_path_factory.mktemp("tokenizer"))


def compiled(document: Document, folder: Path) -> Tokenizer:
    compile_tokenizer(document, folder / "tokenizer.bin")
    return Tokenizer.open(folder / "tokenizer.bin")


SPACES = ("\r\n", "\n\n", "   ", "\t", "\xa0", "\u2028", "\u3000", "\x1c", "\x85", "\u200b")
MARKS = ("e\u0301", "\u0301", "\u0345", "\u0334", "\u0327\u0323", "\u1ab0", "\u0898", "\u0958")
HANGUL = ("\u1100\u1161", "\u11a8", "각")
WORDS = ("<|", "|>", "im_end", "'ll", "'S", "'\u017f", "'re", "''", "²", "Ⅷ", "٣", "\ufb01", "👩‍👩‍👧", "door", " the")
NASTY = st.sampled_from([*CONTROL, *PLAIN_ADDED, *SPACES, *MARKS, *HANGUL, *WORDS])
NASTY_TEXT = st.lists(st.one_of(NASTY, st.characters(exclude_categories=["Cs"]), st.text("ab 1.\n'"))).map("".join)


@given(text=NASTY_TEXT)
def test_ids_equal_those_of_the_reference(tokenizer: Tokenizer, text: str) -> None:
    """With control tokens meant, and with all of them as plain characters."""
    assert REFERENCE.encode(text).ids == tokenizer.encode(text, special=True)
    assert PLAIN_REFERENCE.encode(text).ids == tokenizer.encode(text)


@given(ids=st.lists(st.integers(0, 720)), skip=st.booleans())
def test_text_equals_that_of_the_reference_for_any_ids(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    """Including invalid UTF-8, control tokens, and ids without a token; at once and as a stream."""
    wanted = REFERENCE.decode(ids, skip_special_tokens=skip)
    stream = tokenizer.stream(skip_special=skip)
    assert wanted == tokenizer.decode(ids, skip_special=skip)
    assert wanted == "".join([stream.push(token) for token in ids]) + stream.flush()


@given(text=NASTY_TEXT)
def test_decoding_inverts_encoding(tokenizer: Tokenizer, text: str) -> None:
    """Up to normalisation, and without a control token."""
    wanted = normalizers.NFC().normalize_str(text)
    assert wanted == tokenizer.decode(tokenizer.encode(text), skip_special=False)


@given(texts=st.lists(NASTY_TEXT), cut=st.randoms())
def test_ids_do_not_tell_where_parts_were_joined(tokenizer: Tokenizer, texts: list[str], cut: Any) -> None:
    whole = "".join(texts)
    at = sorted(cut.randrange(len(whole) + 1) for _ in texts)
    parts = [whole[i:j] for i, j in zip([0, *at], [*at, len(whole)], strict=True)]
    assert tokenizer.encode(whole) == tokenizer.encode_parts((part, False) for part in parts)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_code_point_is_cut_as_the_reference_cuts_it(pattern: str) -> None:
    split = pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated")
    ours = Pretokenizer(pattern, *map(memoryview, character_classes()))
    for start in [*range(0, 0x32000, 0x2000), 0xE0000, 0x10F000]:
        points = [point for point in range(start, start + 0x2000) if not 0xD800 <= point < 0xE000 and point < 0x110000]
        text = "\n".join(f"'{chr(point)}x {chr(point)}1" for point in points)
        assert [word for word, _ in split.pre_tokenize_str(text)] == ours.split(text)


def test_every_mark_is_ordered_as_the_reference_orders_it() -> None:
    """Its tables are older than Python's: marks that it does not know stay where they are."""
    ours = Normalizer(*map(memoryview, normalized_ranges()))
    reference = normalizers.NFC()
    marks = [chr(point) for point in range(0x20000) if unicodedata.combining(chr(point))]
    of_each_class = {unicodedata.combining(mark): mark for mark in reversed(marks)}.values()
    for other in of_each_class:
        text = "\n".join(f"A{other}{mark}{other}" for mark in marks)
        assert reference.normalize_str(text) == ours.normalize(text)
    assert "a\u0898\u0316" == ours.normalize("a\u0898\u0316") != unicodedata.normalize("NFC", "a\u0898\u0316")


@pytest.mark.parametrize("word", ["a" * 50_000, "ab" * 25_000, " " * 50_000 + "x", "\n " * 25_000, "the" * 20_000])
def test_very_long_words_agree(tokenizer: Tokenizer, word: str) -> None:
    assert PLAIN_REFERENCE.encode(word).ids == tokenizer.encode(word)


def test_control_tokens_in_text_are_plain_characters(tokenizer: Tokenizer) -> None:
    text = "<|im_end|>\n<|im_start|>system"
    assert not {tokenizer.token_id(content) for content in CONTROL} & set(tokenizer.encode(text))
    assert text == tokenizer.decode(tokenizer.encode(text))
    assert tokenizer.token_id("<|im_end|>") == tokenizer.encode(text, special=True)[0]


def test_control_tokens_cannot_be_composed_of_parts(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_parts([("<|im_", False), ("end|>", True)])
    assert tokenizer.token_id("<|im_end|>") not in ids


def test_empty_text_has_no_tokens(tokenizer: Tokenizer) -> None:
    assert [] == tokenizer.encode("") == tokenizer.encode("", special=True) == tokenizer.encode_parts([])
    assert tokenizer.decode([]) == ""


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a\ufffdb") == tokenizer.encode("a\ud800b")


def test_a_stream_holds_back_a_split_character_and_nothing_else(tokenizer: Tokenizer) -> None:
    lead, second, third = _bytes_of(tokenizer, "厨")
    stream = tokenizer.stream()
    assert [stream.push(token) for token in (lead, second, third)] == ["", "", "厨"]
    assert stream.push(lead) + stream.push(_bytes_of(tokenizer, "A")[0]) == "\ufffdA"
    assert (stream.push(lead), stream.flush(), stream.flush()) == ("", "\ufffd", "")


def _bytes_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of the tokens of one byte each."""
    by_bytes = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    return [by_bytes[bytes([byte])] for byte in text.encode()]


def test_tokens_are_known_by_id_and_control_tokens_by_name(tokenizer: Tokenizer) -> None:
    assert REFERENCE.get_vocab_size() == tokenizer.vocab_size
    assert REFERENCE.token_to_id("<think>") == tokenizer.token_id("<think>")
    assert tokenizer.token_id("kitchen") is None
    assert tokenizer.token_bytes(REFERENCE.token_to_id("<think>")) == b"<think>"
    assert b"" == tokenizer.token_bytes(-1) == tokenizer.token_bytes(10**9)


def test_memory_of_seen_words_and_characters_is_bounded(tokenizer: Tokenizer) -> None:
    tokenizer.encode("".join(chr(point) for point in range(0xE000, 0x18000)))
    for number in range(10_000):
        tokenizer.encode(f"word{chr(0x4E00 + number)}")
    assert len(tokenizer._pretokenizer._signs) <= 4096
    assert tokenizer._cached_word.cache_info().currsize <= 8192


def test_both_forms_of_merges_compile_to_the_same_bytes(tmp_path: Path) -> None:
    document = copy.deepcopy(DOCUMENT)
    document["model"]["merges"] = [" ".join(merge) for merge in DOCUMENT["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    compile_tokenizer(tmp_path / "tokenizer.json", tmp_path / "strings.bin")
    compile_tokenizer(DOCUMENT, tmp_path / "lists.bin")
    assert (tmp_path / "lists.bin").read_bytes() == (tmp_path / "strings.bin").read_bytes()


def test_the_pattern_of_qwen2_agrees_too(tmp_path: Path) -> None:
    document = trained("qwen2")
    reference = Reference.from_str(json.dumps(document))
    assert reference.encode(CORPUS).ids == compiled(document, tmp_path).encode(CORPUS, special=True)


UNSUPPORTED: list[tuple[str, Any, str]] = [
    ("normalizer", {"type": "NFKC"}, "normalizer"),
    ("normalizer", None, "normalizer"),
    ("pre_tokenizer", {"type": "Whitespace"}, "pre_tokenizer"),
    ("pre_tokenizer.pretokenizers.0.pattern.Regex", r"\p{N}{1,3}", "pattern"),
    ("pre_tokenizer.pretokenizers.1.add_prefix_space", True, "pre_tokenizer"),
    ("decoder", {"type": "Metaspace"}, "decoder"),
    ("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}]}, "post_processor"),
    ("model.type", "Unigram", "model.type"),
    ("model.byte_fallback", True, "model.byte_fallback"),
    ("model.ignore_merges", True, "model.ignore_merges"),
    ("model.dropout", 0.1, "model.dropout"),
    ("model.continuing_subword_prefix", "##", "model.continuing_subword_prefix"),
    ("model.vocab", {"a": 0}, "no token for the bytes"),
    ("model.vocab.e", 0, "one id to two tokens"),
    ("model.merges", [["zz", "top"]], "merge 0"),
    ("added_tokens.0.lstrip", True, "lstrip of the added token '<|endoftext|>'"),
    ("added_tokens.0.normalized", True, "normalized of the added token '<|endoftext|>'"),
    ("added_tokens.0.id", 3, "which is another's"),
    ("added_tokens.0.id", 7000, "another id"),
    ("model", None, "no vocabulary"),
]


@pytest.mark.parametrize(("path", "value", "named"), UNSUPPORTED)
def test_what_is_unsupported_is_refused_by_name(path: str, value: Any, named: str, tmp_path: Path) -> None:
    document = copy.deepcopy(DOCUMENT)
    *parents, last = path.split(".")
    part: Any = document
    for key in parents:
        part = part[int(key)] if key.isdigit() else part[key]
    part[last] = value
    with pytest.raises(CheckpointError, match=named):
        compile_tokenizer(document, tmp_path / "tokenizer.bin")


def test_a_file_that_is_no_tokenizer_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("[")
    for name in ("tokenizer.json", "absent.json"):
        with pytest.raises(CheckpointError, match=name):
            compile_tokenizer(tmp_path / name, tmp_path / "tokenizer.bin")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.bin"
    compile_tokenizer(DOCUMENT, path)
    whole = path.read_bytes()
    for content in (
        b"",
        whole[:5],
        whole[:40],
        whole[:-100],
        b"x" + whole[1:],
        whole.replace(b'"format": 1', b'"format": 9'),
    ):
        path.write_bytes(content)
        with pytest.raises(PackageError, match=r"tokenizer\.bin"):
            Tokenizer.open(path)
    with pytest.raises(PackageError, match="absent"):
        Tokenizer.open(tmp_path / "absent.bin")


@given(text=NASTY_TEXT)
def test_a_tokenizer_of_bytes_reads_bytes(text: str) -> None:
    document = byte_tokenizer_json({"<|im_start|>": 300, "<|im_end|>": 5}, 320)
    reference = Reference.from_str(json.dumps(document))
    assert normalizers.NFC().normalize_str(text) == reference.decode(
        reference.encode(text).ids, skip_special_tokens=False
    )


def test_a_tokenizer_of_bytes_has_its_control_tokens_where_they_are_wanted(tmp_path: Path) -> None:
    tokenizer = compiled(byte_tokenizer_json({"<|im_start|>": 300, "<|im_end|>": 5}, 320), tmp_path)
    assert tokenizer.encode("<|im_start|><|im_end|>", special=True) == [300, 5]
    assert tokenizer.decode([300, 299, *tokenizer.encode("ü"), 5]) == "ü"
    assert tokenizer.vocab_size == 301


@pytest.mark.parametrize(("specials", "size"), [({"<a>": 320}, 320), ({"<a>": 7, "<b>": 7}, 320), ({}, 255)])
def test_a_tokenizer_of_bytes_needs_room(specials: dict[str, int], size: int) -> None:
    with pytest.raises(CheckpointError, match="distinct ids below"):
        byte_tokenizer_json(specials, size)
