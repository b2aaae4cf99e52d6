"""Heads: the largest logit is the exact head's, however many others were left out."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from iotd.convert.convert import RECIPES, convert_random
from iotd.convert.head import write_head
from iotd.convert.random import random_config
from iotd.convert.shortlist import checked, of_languages, of_texts
from iotd.convert.spec import spec_from_config
from iotd.convert.weights import Matrix
from iotd.errors import InvalidInput, PackageError
from iotd.model import Model
from iotd.model import head as heads
from iotd.model.head import Head, HeadKind
from iotd.model.package import HEAD_IDS, TOKENIZER, HeadEntry
from iotd.model.session import Threads, open_session
from iotd.model.spec import ModelSpec
from iotd.model.tokenizer import Tokenizer

Floats = NDArray[np.float32]
VOCAB, HIDDEN = 4001, 256
SPEC: ModelSpec = msgspec.structs.replace(
    spec_from_config(random_config("tiny"), None, tied=True, vision=False), vocab_size=VOCAB, hidden_size=HIDDEN
)
RNG = np.random.default_rng(0)
EVEN = RNG.standard_normal((VOCAB, HIDDEN)).astype(np.float32)
"""Rows that are as long in every direction."""
LEANING = (EVEN * np.geomspace(4, 0.004, HIDDEN)) @ np.linalg.qr(RNG.standard_normal((HIDDEN, HIDDEN)))[0]
LEANING = LEANING.astype(np.float32)
"""Rows that are long in few directions, as trained ones are."""
TOLERANCE = {"fp32": 1e-3, "int4": 0.6}
"""Of a logit that was computed alone: the int4 kernel rounds hidden states to 8 bits, and logits here are some tens."""


class OneMatrix:
    def __init__(self, values: Floats) -> None:
        self._values = values

    def tensor(self, name: str, *shape: int) -> Floats:
        raise AssertionError(name)

    def matrix(self, name: str, rows: int, columns: int, *, again: bool = False) -> Matrix:
        assert self._values.shape == (rows, columns)
        return Matrix.of(self._values)


def open_head(folder: Path, entry: HeadEntry, kind: HeadKind = "exact") -> Head:
    return Head(folder, entry, SPEC, lambda path: open_session(path, Threads(1)), kind)


@pytest.fixture(params=["fp32", "int4"])
def recipe(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def both(folder: Path, values: Floats, recipe: str, shortlist: Sequence[int] | None = None) -> tuple[Head, Head]:
    entry = write_head(folder, SPEC, OneMatrix(values), RECIPES[recipe], shortlist)
    return open_head(folder, entry), open_head(folder, entry, "two-stage")


def hidden_states(n: int) -> Floats:
    return RNG.standard_normal((n, HIDDEN)).astype(np.float32)


def test_the_largest_is_the_exact_heads(tmp_path: Path, recipe: str) -> None:
    exact, two_stage = both(tmp_path, LEANING, recipe)
    n_given = []
    for hidden in hidden_states(60).reshape(20, 3, HIDDEN):
        for expected, found in zip(exact.logits(hidden).copy(), two_stage.logits(hidden), strict=True):
            kept = np.isfinite(found)
            n_given.append(kept.sum())
            np.testing.assert_allclose(found[kept], expected[kept], atol=TOLERANCE[recipe])
            assert expected[found.argmax()] >= expected.max() - TOLERANCE[recipe]
    assert min(n_given) >= heads.CANDIDATES
    assert np.median(n_given) < VOCAB / 8


def test_where_it_cannot_be_sure_all_logits_are_given(tmp_path: Path, recipe: str) -> None:
    exact, two_stage = both(tmp_path, EVEN, recipe)
    for hidden in hidden_states(20)[:, None]:
        np.testing.assert_array_equal(two_stage.logits(hidden), exact.logits(hidden))


def test_a_coarse_head_that_is_seldom_sure_is_left_out_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    _, two_stage = both(tmp_path, EVEN, "fp32")
    assert two_stage._coarse is not None
    run = two_stage._coarse._graph.run

    def counted(hidden: Floats) -> Floats:
        runs.append(1)
        return run(hidden)

    monkeypatch.setattr(two_stage._coarse._graph, "run", counted)
    for hidden in hidden_states(3 * heads.PAUSE)[:, None]:
        two_stage.logits(hidden)
    assert 0 < len(runs) < heads.PAUSE


def test_logits_of_a_few_tokens_are_those_of_all(tmp_path: Path, recipe: str) -> None:
    exact, _ = both(tmp_path, LEANING, recipe)
    hidden = hidden_states(1)
    ids = np.array([4000, 0, 17, 1234])
    np.testing.assert_allclose(exact.some(hidden[0], ids), exact.logits(hidden)[0, ids], atol=TOLERANCE[recipe])


@pytest.mark.parametrize("kind", ["exact", "two-stage"])
def test_tokens_that_are_not_on_the_shortlist_have_no_logit(tmp_path: Path, recipe: str, kind: str) -> None:
    shortlist = list(range(5, VOCAB, 3))
    (tmp_path / "short").mkdir()
    whole, _ = both(tmp_path, LEANING, recipe)
    exact, two_stage = both(tmp_path / "short", LEANING, recipe, shortlist)
    hidden = hidden_states(2)
    found = (exact if kind == "exact" else two_stage).logits(hidden)
    expected = np.full_like(found, -np.inf)
    expected[:, shortlist] = whole.logits(hidden)[:, shortlist]
    kept = np.isfinite(found)
    assert not kept[:, np.setdiff1d(np.arange(VOCAB), shortlist)].any()
    np.testing.assert_allclose(found[kept], expected[kept], atol=TOLERANCE[recipe])
    some = exact.some(hidden[0], np.array([5, 6, 8, 0]))
    np.testing.assert_array_equal(np.isfinite(some), [True, False, True, False])


def test_a_list_that_is_not_the_manifests_is_refused(tmp_path: Path) -> None:
    entry = write_head(tmp_path, SPEC, OneMatrix(LEANING), RECIPES["fp32"], [1, 2, 3])
    for ids in ([1, 2], [1, 3, 2], [1, 2, VOCAB], [-1, 2, 3]):
        (tmp_path / HEAD_IDS).write_bytes(np.array(ids, "<i4").tobytes())
        with pytest.raises(PackageError, match="does not hold the 3 tokens"):
            open_head(tmp_path, entry)


def test_a_graph_of_another_size_is_refused(tmp_path: Path) -> None:
    entry = write_head(tmp_path, SPEC, OneMatrix(LEANING), RECIPES["fp32"], None)
    with pytest.raises(PackageError, match="is not the head of 4000 × 256"):
        open_head(tmp_path, msgspec.structs.replace(entry, rows=4000))


def test_every_text_can_still_be_said(tiny_package: Path) -> None:
    """The bytes and the control tokens stay, whatever the texts are made of."""
    tokenizer = Tokenizer.open(tiny_package / TOKENIZER)
    for kept in (of_texts(tokenizer, ["a"]), of_languages(tokenizer, ["en"])):
        assert kept == sorted(set(kept))
        assert set(tokenizer.byte_ids) | set(tokenizer.control_ids) <= set(kept)


def test_letters_of_other_scripts_are_left_out(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.open(tiny_package / TOKENIZER)
    texts = ["door", " Tür", "дверь", "门", "21 °C", "🚪", "ドア", "…"]
    bytes_of = dict(enumerate([text.encode() for text in texts] + ["门".encode()[:2], b""]))
    monkeypatch.setattr(Tokenizer, "token_bytes", lambda _, token: bytes_of.get(token, b""))
    monkeypatch.setattr(Tokenizer, "byte_ids", [])
    monkeypatch.setattr(Tokenizer, "control_ids", [])

    def kept(language: str) -> list[str]:
        return [texts[token] for token in of_languages(tokenizer, [language])]

    assert kept("en") == ["door", " Tür", "21 °C", "🚪", "…"]
    assert kept("ru") == ["door", " Tür", "дверь", "21 °C", "🚪", "…"]
    assert kept("ja") == ["door", " Tür", "门", "21 °C", "🚪", "ドア", "…"]


def test_an_unknown_language_is_named(tiny_package: Path) -> None:
    with pytest.raises(InvalidInput, match="'xx' is none of the languages known"):
        checked(["en", "xx"])


def test_a_package_with_a_shortlist_speaks_of_it_alone(tmp_path: Path) -> None:
    """What it reads may be any text, what it says is made of the shortlist."""
    convert_random("tiny", tmp_path / "short", recipe="int4", shortlist=lambda tokenizer: of_texts(tokenizer, ["ab"]))
    convert_random("tiny", tmp_path / "whole", recipe="int4")
    short, whole = (Model.open(tmp_path / name, threads=1) for name in ("short", "whole"))
    ids = [*range(300, 0, -7)]
    found, expected = (model.prefill(model.new_state(64), ids) for model in (short, whole))
    kept = np.isfinite(found)
    assert kept[list(whole.tokenizer.byte_ids)].all()
    assert not kept.all()
    np.testing.assert_allclose(found[kept], expected[kept], atol=1e-4)
