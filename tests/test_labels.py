"""Labels are scored exactly: as a brute-force computation, token by token over a copy of the state, has it."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iotd.convert.convert import convert_random
from iotd.convert.shortlist import of_texts
from iotd.errors import InvalidInput
from iotd.events import Labels, LabelScore, Weighed
from iotd.model import Model, State
from iotd.model.decoder import CHUNK
from iotd.model.labels import Weighing, label_paths

PROMPT = [*b"Is a door open?"]
TOLERANCE = 1e-3
"""Of a log probability in float32: a label's tokens are read in other runs than one by one."""
TEXTS = st.text("ab", min_size=1, max_size=12)


@pytest.fixture(scope="module")
def model(tiny_package: Path) -> Model:
    return Model.open(tiny_package, threads=1)


def weigh(model: Model, labels: Labels, prompt: Sequence[int] = PROMPT) -> tuple[Weighed, int]:
    """The result, and the runs that it took."""
    state = model.new_state(len(prompt) + CHUNK)
    logits = model.prefill(state, prompt, only=model.every_token)
    weighing = model.weighing(state, logits, labels, model.label_paths(labels.texts))
    return finished(weighing)


def finished(weighing: Weighing) -> tuple[Weighed, int]:
    n_runs = 0
    while not weighing.done:
        weighing.step()
        n_runs += 1
    return weighing.result(), n_runs


def log_softmax(logits: np.ndarray) -> np.ndarray:
    exact = logits.astype(np.float64)
    return exact - exact.max() - math.log(np.exp(exact - exact.max()).sum())


def brute_force(model: Model, label: str, prompt: Sequence[int] = PROMPT) -> float:
    """Log probability that the answer begins with the label's tokens, read one at a time."""
    state = model.new_state(len(prompt) + CHUNK)
    logits = model.prefill(state, prompt)
    total = 0.0
    for token in model.tokenizer.encode(label):
        total += log_softmax(logits)[token]
        logits = model.step(state, token)
    return total


def log_p(weighed: Weighed) -> dict[str, float]:
    return {score.label: score.log_probability for score in weighed.labels}


def probabilities(weighed: Weighed) -> list[float]:
    return [score.probability for score in weighed.labels]


def test_a_label_of_one_token_takes_no_run(model: Model) -> None:
    weighed, n_runs = weigh(model, Labels(("y", "n")))
    assert n_runs == 0
    expected = log_softmax(model.prefill(model.new_state(99), PROMPT))
    assert log_p(weighed) == pytest.approx({"y": expected[ord("y")], "n": expected[ord("n")]}, abs=1e-6)
    odds = np.exp([expected[ord("y")], expected[ord("n")]])
    assert probabilities(weighed) == pytest.approx(odds / odds.sum(), abs=1e-6)


@settings(max_examples=30)
@given(texts=st.lists(TEXTS, min_size=1, max_size=8, unique=True))
def test_every_log_probability_is_that_of_its_tokens_one_by_one(model: Model, texts: list[str]) -> None:
    """Of labels whose mean is asked for nothing is taken off; few letters make many common beginnings."""
    weighed, _ = weigh(model, Labels(tuple(texts), length_normalized=True))
    for label, found in log_p(weighed).items():
        assert found * len(label) == pytest.approx(brute_force(model, label), abs=TOLERANCE)
    weights = np.exp(list(log_p(weighed).values()))
    assert probabilities(weighed) == pytest.approx(weights / weights.sum())


@settings(max_examples=30)
@given(texts=st.lists(TEXTS, min_size=1, max_size=8, unique=True))
def test_no_answer_counts_for_two_labels(model: Model, texts: list[str]) -> None:
    """A label's own probability lacks those of the longer labels that it begins, and with none of them all are 1."""
    weighed, _ = weigh(model, Labels(tuple(texts), none_of_these=True))
    whole = {label: math.exp(brute_force(model, label)) for label in texts}
    own = {label: math.exp(value) for label, value in log_p(weighed).items()}
    for label in texts:
        begun = sum(own[other] for other in texts if other.startswith(label))
        assert begun == pytest.approx(whole[label], rel=TOLERANCE)
    assert weighed.none_probability is not None
    first = sum(whole[label] for label in texts if not any(label != o and label.startswith(o) for o in texts))
    assert weighed.none_probability == pytest.approx(1 - first, abs=TOLERANCE)
    assert probabilities(weighed) == pytest.approx(list(own.values()))
    assert sum(probabilities(weighed)) + weighed.none_probability == pytest.approx(1)


def test_labels_that_begin_alike_share_their_runs(model: Model) -> None:
    assert weigh(model, Labels(("abcdefgh",)))[1] == 1
    assert weigh(model, Labels(("abcdefgh", "abcdefgx", "abcx", "ax", "abcde")))[1] == 1
    assert weigh(model, Labels(("abcdefgh", "xbcdefgh", "abxdefgh")))[1] == 3


@pytest.mark.parametrize("length", [9, 10, 25, CHUNK])
def test_long_labels_take_several_runs_and_are_as_exact(model: Model, length: int) -> None:
    label = ("kitchen window " * 20)[:length]
    weighed, n_runs = weigh(model, Labels((label, label[:-2] + "xy")))
    assert n_runs == -(-(length - 1) // 8) + 1
    found = log_p(weighed)
    for each in found:
        assert found[each] == pytest.approx(brute_force(model, each), rel=1e-4)


def test_a_label_may_fill_the_state_to_its_last_token(model: Model) -> None:
    label = "kitchen window"
    state = model.new_state(len(PROMPT) + len(label) - 1)
    logits = model.prefill(state, PROMPT, only=model.every_token)
    weighed, _ = finished(model.weighing(state, logits, Labels((label,)), model.label_paths([label])))
    assert log_p(weighed)[label] == pytest.approx(brute_force(model, label), abs=TOLERANCE)


def test_weighing_leaves_the_state_as_it_was(model: Model) -> None:
    state, owner = model.new_state(0), model.new_state(64)
    model.prefill(owner, PROMPT, logits=False)
    owner.lend_to(state)
    other = owner.copy()
    logits = model.prefill(state, [65], only=model.every_token)
    labels = Labels(("yes, it is", "no, it is not"))
    finished(model.weighing(state, logits, labels, model.label_paths(labels.texts)))
    model.prefill(other, [65], logits=False)
    np.testing.assert_array_equal(model.step(state, 66), model.step(other, 66))


def test_the_temperature_divides_the_scores(model: Model) -> None:
    texts = ("yes", "no", "perhaps")
    plain, _ = weigh(model, Labels(texts, none_of_these=True))
    for temperature in (1e-320, 0.01, 0.5, 3.0, 1e300):
        weighed, _ = weigh(model, Labels(texts, none_of_these=True, temperature=temperature))
        assert log_p(weighed) == log_p(plain)
        assert plain.none_probability is not None and weighed.none_probability is not None
        scores = np.array([*log_p(plain).values(), math.log(plain.none_probability)]) / max(temperature, 1e-3)
        expected = np.exp(scores - scores.max())
        found = [*probabilities(weighed), weighed.none_probability]
        assert found == pytest.approx(expected / expected.sum(), abs=1e-9)


def test_a_label_that_a_longer_one_always_follows_keeps_a_logarithm() -> None:
    class Certain:
        def verify(self, state: object, beside: object, tokens: object, n_rows: int, only: object) -> np.ndarray:
            return np.array([[500.0, 0.0]], np.float32)

    labels = Labels(("a", "aa"), none_of_these=True)
    parts = Certain(), State, State, np.array([500.0, 0.0], np.float32)
    weighed, _ = finished(Weighing(*parts, labels, [(0,), (0, 0)]))  # type: ignore[arg-type] # a stand-in
    assert weighed.labels[1] == LabelScore("aa", pytest.approx(1), 0.0)
    assert -40 < weighed.labels[0].log_probability < -30
    assert weighed.none_probability == pytest.approx(0)


@pytest.mark.parametrize("recipe", ["fp32", "int4"])
def test_a_two_stage_head_scores_as_the_exact_one(tmp_path: Path, recipe: str) -> None:
    """Also where it is sure of the largest logit, and leaves the others out."""
    convert_random("tiny", tmp_path / "package", recipe=recipe)
    exact, two_stage, coarse = (
        Model.open(tmp_path / "package", threads=1, head=head)  # type: ignore[arg-type] # one of them
        for head in ("exact", "two-stage", "coarse")
    )
    assert np.isinf(coarse.prefill(coarse.new_state(99), PROMPT)).any()
    labels = Labels(("yes", "no", "y", "perhaps"), none_of_these=True)
    expected, _ = weigh(exact, labels)
    for model in (two_stage, coarse):
        found, _ = weigh(model, labels)
        assert log_p(found) == pytest.approx(log_p(expected), abs=1e-5)
        assert found.none_probability == pytest.approx(expected.none_probability)


def test_with_a_shortlist_what_cannot_be_answered_is_refused(tmp_path: Path) -> None:
    convert_random("tiny", tmp_path / "short", recipe="fp32", shortlist=lambda tokenizer: of_texts(tokenizer, ["ab"]))
    model = Model.open(tmp_path / "short", threads=1)
    weighed, _ = weigh(model, Labels(("yes", "no"), none_of_these=True))
    assert log_p(weighed) == pytest.approx({label: brute_force(model, label) for label in ("yes", "no")}, abs=TOLERANCE)
    assert model._head.shortlist is not None
    short = np.setdiff1d(model._head.shortlist, [ord("é".encode()[-1:])])
    with pytest.raises(InvalidInput, match=r"labels\[1\]: the words this model was converted for lack") as caught:
        label_paths(["yes", "né"], model.tokenizer, short)
    assert caught.value.field == "labels[1]"


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (("yes", "x" * (CHUNK + 1)), r"labels\[1\] takes 129 tokens: at most 128 are scored"),
        (("x", "\u00e9", "e\u0301"), r"labels\[2\] and labels\[1\] are the same to the model"),
    ],
)
def test_labels_that_cannot_be_scored_are_named(model: Model, labels: tuple[str, ...], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        model.label_paths(labels)
