"""Heads: the likeliest token is the exact head's, however many logits were left out."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from iotd.convert import coarse
from iotd.convert.coarse import HiddenStates
from iotd.convert.convert import RECIPES, convert_random
from iotd.convert.directions import Directions
from iotd.convert.head import write_head
from iotd.convert.judge import LEAST_ODDS, divergence
from iotd.convert.random import random_config
from iotd.convert.rounding import Nearest
from iotd.convert.shortlist import checked, of_languages, of_texts
from iotd.convert.spec import spec_from_config
from iotd.convert.weights import Matrix
from iotd.errors import InvalidInput, PackageError
from iotd.model import Model
from iotd.model.head import MOST_ROWS, PENALTY, Head, HeadChoice, head_in_use
from iotd.model.package import COARSE_HEAD, HEAD_IDS, TOKENIZER, HeadEntry
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
FACTORS = np.exp(1.5 * RNG.standard_normal(HIDDEN)).astype(np.float32)
"""Of the channels: hidden states are large in some, and the rows small there."""
TURN = np.linalg.qr(RNG.standard_normal((HIDDEN, HIDDEN)))[0].astype(np.float32)
ROWS = EVEN @ TURN / FACTORS + RNG.standard_normal(HIDDEN).astype(np.float32) / FACTORS
TOLERANCE = {"fp32": 1e-2, "int4-64": 2e-2}
"""Of a logit that was computed alone: logits here are some tens."""


def states(n: int) -> Floats:
    """Hidden states in which few directions tell the most, none of them along a channel."""
    found: Floats = RNG.standard_normal((n, HIDDEN)).astype(np.float32) * np.geomspace(
        4, 0.004, HIDDEN, dtype=np.float32
    )
    return found @ TURN * FACTORS


KNOWN = HiddenStates(states(2000), states(1000))
NOISE = HiddenStates(*(RNG.standard_normal((n, HIDDEN)).astype(np.float32) for n in (2000, 1000)))


class OneMatrix:
    def __init__(self, values: Floats) -> None:
        self._values = values

    def tensor(self, name: str, *shape: int) -> Floats:
        raise AssertionError(name)

    def matrix(self, name: str, rows: int, columns: int, *, again: bool = False) -> Matrix:
        assert self._values.shape == (rows, columns)
        return Matrix.of(self._values)


@pytest.fixture(autouse=True)
def _even_a_small_head_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coarse, "OVERHEAD_NBYTES", 0)
    monkeypatch.setattr(coarse, "CANDIDATE_NBYTES", 1)


def open_head(folder: Path, entry: HeadEntry, choice: HeadChoice = "exact") -> Head:
    return Head(folder, entry, SPEC, lambda path: open_session(path, Threads(1)), choice)


@pytest.fixture(params=["fp32", "int4-64"])
def recipe(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def written(
    folder: Path, values: Floats, recipe: str, hidden: HiddenStates | None = KNOWN, *, keep: bool = False
) -> HeadEntry:
    return write_head(folder, SPEC, OneMatrix(values), Nearest(RECIPES[recipe]), None, hidden, keep=keep)


def both(folder: Path, recipe: str, shortlist: Sequence[int] | None = None) -> tuple[Head, Head]:
    entry = write_head(folder, SPEC, OneMatrix(ROWS), Nearest(RECIPES[recipe]), shortlist, KNOWN)
    return open_head(folder, entry), open_head(folder, entry, "auto")


def test_the_likeliest_is_the_exact_heads(tmp_path: Path, recipe: str) -> None:
    """Channels that are large in hidden states and small in the rows, or the other way around, change nothing."""
    exact, two_stage = both(tmp_path, recipe)
    assert two_stage.kind == "two-stage"
    n_given = []
    for hidden in states(60).reshape(20, 3, HIDDEN):
        for expected, found in zip(exact.logits(hidden).copy(), two_stage.logits(hidden), strict=True):
            kept = np.isfinite(found)
            n_given.append(kept.sum())
            np.testing.assert_allclose(found[kept], expected[kept], atol=TOLERANCE[recipe])
            assert found.argmax() == expected.argmax()
    assert min(n_given) >= min(coarse.CANDIDATES)
    assert np.median(n_given) < VOCAB / 3


def test_conversion_tells_what_it_found(tmp_path: Path, recipe: str) -> None:
    entry = written(tmp_path, ROWS, recipe)
    found = entry.coarse
    assert found is not None and not entry.exact_because
    assert (found.n_states, found.argmax) == (1000, 1.0)
    assert found.fallback <= 0.04 and found.top20 >= 0.995 and found.kl <= 0.001
    kind, because = head_in_use(entry, "auto")
    assert kind == "two-stage" and "1000 states" in because


def test_directions_that_know_no_hidden_states_would_not_do(tmp_path: Path, recipe: str) -> None:
    """The rows alone are longest where hidden states are smallest."""
    entry = written(tmp_path, ROWS, recipe, HiddenStates(NOISE.fit, KNOWN.held))
    assert entry.coarse is None and "often enough" in entry.exact_because
    assert not (tmp_path / COARSE_HEAD).exists()


def test_where_all_directions_count_alike_there_is_no_coarse_head(tmp_path: Path, recipe: str) -> None:
    entry = written(tmp_path, EVEN, recipe, NOISE)
    assert entry.coarse is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head.onnx", "head.onnx.data"]
    assert head_in_use(entry, "auto")[0] == "exact"


@pytest.mark.parametrize(
    ("hidden", "because"),
    [
        (None, "without calibration"),
        (HiddenStates(KNOWN.fit, KNOWN.held[:999]), "999 tokens back, and 1000 are needed"),
    ],
)
def test_what_cannot_be_judged_is_not_written(tmp_path: Path, hidden: HiddenStates | None, because: str) -> None:
    entry = written(tmp_path, ROWS, "int4", hidden)
    assert entry.coarse is None and because in entry.exact_because
    with pytest.raises(PackageError, match=f"{because}.*choose auto or exact, or convert the checkpoint again"):
        open_head(tmp_path, entry, "two-stage")


def test_a_small_vocabulary_needs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coarse, "OVERHEAD_NBYTES", 4_000_000)
    assert "the vocabulary is small" in written(tmp_path, ROWS, "int4").exact_because


def test_a_head_of_an_older_package_is_exact() -> None:
    entry = msgspec.json.decode(
        b'{"rows": 7, "table": {"file": "f", "bits": 4, "block": 32, "codes_offset": 0, "scales_offset": 9}}',
        type=HeadEntry,
    )
    assert head_in_use(entry, "auto") == ("exact", "it was converted by an older iotd")
    with pytest.raises(PackageError, match="by an older iotd"):
        head_in_use(entry, "coarse")


def test_one_for_measuring_is_used_where_it_is_asked_for_alone(tmp_path: Path, recipe: str) -> None:
    entry = written(tmp_path, EVEN, recipe, NOISE, keep=True)
    assert open_head(tmp_path, entry, "auto").kind == "exact"
    hidden = NOISE.held[:1]
    assert np.isinf(open_head(tmp_path, entry, "coarse").logits(hidden)).any()


def test_where_it_cannot_be_sure_all_logits_are_given(tmp_path: Path, recipe: str) -> None:
    entry = written(tmp_path, EVEN, recipe, NOISE, keep=True)
    exact, two_stage = open_head(tmp_path, entry), open_head(tmp_path, entry, "two-stage")
    for hidden in NOISE.held[:20, None] * np.float32(0.01):  # all logits are near each other
        np.testing.assert_array_equal(two_stage.logits(hidden), exact.logits(hidden))


def test_rows_of_one_run_are_as_they_are_alone(tmp_path: Path, recipe: str) -> None:
    """Also where some of them are in doubt."""
    _, two_stage = both(tmp_path, recipe)
    hidden = states(MOST_ROWS)
    hidden[::3] *= 0.01  # too near each other to tell
    together = two_stage.logits(hidden).copy()
    assert np.isfinite(together).all(axis=1)[::3].all() and not np.isfinite(together).all()
    for expected, state in zip(together, hidden, strict=True):
        np.testing.assert_allclose(two_stage.logits(state[None])[0], expected, atol=TOLERANCE[recipe])


@pytest.mark.parametrize("penalty", [PENALTY, -PENALTY])
def test_a_presence_penalty_makes_no_other_token_the_best(tmp_path: Path, recipe: str, penalty: float) -> None:
    """Neither where the likeliest were drawn before, nor where tokens far down were and are led back."""
    exact, two_stage = both(tmp_path, recipe)
    for hidden in states(40)[:, None]:
        expected, found = exact.logits(hidden)[0].copy(), two_stage.logits(hidden)[0].copy()
        drawn = np.argsort(-expected)[: 600 if penalty < 0 else 10]
        expected[drawn] -= penalty
        found[drawn] -= penalty
        assert expected[found.argmax()] >= expected.max() - TOLERANCE[recipe]


def test_logits_of_a_few_tokens_are_those_of_all(tmp_path: Path, recipe: str) -> None:
    """As its kernel rounds hidden states, outliers and all."""
    exact, _ = both(tmp_path, recipe)
    for hidden in states(5)[:, None]:
        ids = np.array([4000, 0, 17, 1234])
        np.testing.assert_allclose(exact.some(hidden[0], ids), exact.logits(hidden)[0, ids], atol=TOLERANCE[recipe])


@pytest.mark.parametrize("kind", ["exact", "two-stage"])
def test_tokens_that_are_not_on_the_shortlist_have_no_logit(tmp_path: Path, recipe: str, kind: str) -> None:
    shortlist = list(range(5, VOCAB, 3))
    (tmp_path / "short").mkdir()
    whole, _ = both(tmp_path, recipe)
    exact, two_stage = both(tmp_path / "short", recipe, shortlist)
    hidden = states(2)
    hidden[1] *= 0.01
    found = (exact if kind == "exact" else two_stage).logits(hidden)
    expected = np.full_like(found, -np.inf)
    expected[:, shortlist] = whole.logits(hidden)[:, shortlist]
    kept = np.isfinite(found)
    assert kept[1].sum() == len(shortlist)
    assert not kept[:, np.setdiff1d(np.arange(VOCAB), shortlist)].any()
    np.testing.assert_allclose(found[kept], expected[kept], atol=TOLERANCE[recipe])
    some = exact.some(hidden[0], np.array([5, 6, 8, 0]))
    np.testing.assert_array_equal(np.isfinite(some), [True, False, True, False])


def test_all_directions_together_lose_nothing_but_what_all_logits_share() -> None:
    matrix, hidden = Matrix.of(ROWS), KNOWN.held[:20]
    directions = Directions.of(matrix, KNOWN.fit)
    coarse_rows = directions.projected(matrix, HIDDEN)
    off = hidden @ ROWS.T - hidden @ directions.hidden @ coarse_rows.read(0, VOCAB).T
    np.testing.assert_allclose(off, off[:, :1] + np.zeros(VOCAB), atol=0.05)


def test_a_divergence_counts_what_cannot_be_drawn() -> None:
    logits = np.array([3.0, 2.0, 1.0], np.float32)
    assert divergence(logits, logits, np.append(logits, -4)) == pytest.approx(0, abs=1e-6)
    lacking = np.array([3.0, -np.inf, 1.0], np.float32)
    odds = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    left = np.exp(np.array([3.0, 1.0, -4.0]) / 0.7)
    expected = odds * np.log(odds / np.array([left[0] / left.sum(), LEAST_ODDS, left[1] / left.sum()]))
    assert divergence(logits, lacking, np.array([3.0, 1.0, -4.0], np.float32)) == pytest.approx(
        expected.sum(), rel=1e-4
    )


def test_a_list_that_is_not_the_manifests_is_refused(tmp_path: Path) -> None:
    entry = write_head(tmp_path, SPEC, OneMatrix(ROWS), Nearest(RECIPES["fp32"]), [1, 2, 3])
    for ids in ([1, 2], [1, 3, 2], [1, 2, VOCAB], [-1, 2, 3]):
        (tmp_path / HEAD_IDS).write_bytes(np.array(ids, "<i4").tobytes())
        with pytest.raises(PackageError, match="does not hold the 3 tokens"):
            open_head(tmp_path, entry)


def test_a_graph_of_another_size_is_refused(tmp_path: Path) -> None:
    entry = write_head(tmp_path, SPEC, OneMatrix(ROWS), Nearest(RECIPES["fp32"]), None)
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


@pytest.mark.parametrize("name", ["fp32", "int4"])
def test_a_shortlist_leaves_a_tied_table_whole_and_in_one_place(tmp_path: Path, name: str) -> None:
    """It has the same row for each token, on the shortlist or not, and no other file holds them again."""
    convert_random("tiny", tmp_path / "short", recipe=name, shortlist=lambda tokenizer: of_texts(tokenizer, ["ab"]))
    convert_random("tiny", tmp_path / "whole", recipe=name)
    short, whole = (Model.open(tmp_path / folder, threads=1) for folder in ("short", "whole"))
    assert short._head.shortlist is not None and len(short._head.shortlist) < whole.spec.vocab_size
    for file in ("head.onnx.data", "decoder.onnx.data"):
        assert short.manifest.files[file].nbytes == whole.manifest.files[file].nbytes
    assert short.manifest.files["coarse-head.onnx.data"].nbytes < whole.manifest.files["coarse-head.onnx.data"].nbytes
    tokens = np.random.default_rng(0).permutation(whole.spec.vocab_size)
    rows = np.zeros((2, len(tokens), whole.spec.hidden_size), np.float32)
    for model, out in zip((short, whole), rows, strict=True):
        model._decoder._table.rows(tokens, out)
    np.testing.assert_array_equal(*rows)


def test_a_package_with_a_shortlist_speaks_of_it_alone(tmp_path: Path) -> None:
    """What it reads may be any text, what it says is made of the shortlist."""
    convert_random("tiny", tmp_path / "short", recipe="fp32", shortlist=lambda tokenizer: of_texts(tokenizer, ["ab"]))
    convert_random("tiny", tmp_path / "whole", recipe="fp32")
    short, whole = (Model.open(tmp_path / name, threads=1) for name in ("short", "whole"))
    ids = [*range(300, 0, -7)]
    found, expected = (model.prefill(model.new_state(64), ids) for model in (short, whole))
    kept = np.isfinite(found)
    assert kept[list(whole.tokenizer.byte_ids)].all()
    assert not kept.all()
    np.testing.assert_allclose(found[kept], expected[kept], atol=1e-4)
