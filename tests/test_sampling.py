"""The laws of drawing a token: what is kept, in which order, and how often each comes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from iotd.config import AskConfig
from iotd.errors import InvalidInput
from iotd.events import Draw, Sampling
from iotd.model.sampling import BLOCK, Sampler, check_sampling, top_k
from iotd.rpc.request import parse
from iotd.v1 import iotd_pb2

Floats = NDArray[np.float32]
PLAIN = Sampling(temperature=1.0, top_p=1.0, top_k=0, presence_penalty=0.0, seed=0)
SMALL = arrays(np.float32, st.integers(1, 40), elements=st.floats(-20, 20, width=16))
N_DRAWS = 4000
SIGMAS = 5.0
"""A frequency this many standard deviations off would be met once in a million seeds; the seed here is fixed."""


@st.composite
def vocabularies(draw: st.DrawFn) -> Floats:
    """Logits of every size around whole blocks, of few values so that ties abound, or of many."""
    size = draw(st.integers(1, 12 * BLOCK + 1))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_values = draw(st.sampled_from([1, 2, 5, 1000]))
    return random.integers(-n_values, n_values, size).astype(np.float32)


@given(logits=vocabularies(), k=st.integers(1, 30))
@example(logits=np.zeros(1, np.float32), k=5)
@example(logits=np.arange(40 * BLOCK, dtype=np.float32), k=3)
@example(logits=np.arange(40 * BLOCK + 7, dtype=np.float32)[::-1].copy(), k=20)
def test_top_k_is_that_of_a_full_sort(logits: Floats, k: int) -> None:
    """The same values in the same order, each index once; of equal ones any may be taken."""
    found = top_k(logits, k)
    assert len(set(found.tolist())) == len(found) == min(k, len(logits))
    np.testing.assert_array_equal(np.sort(logits)[::-1][:k], logits[found])


@given(logits=vocabularies(), seed=st.integers(0, 1000))
def test_without_temperature_the_likeliest_is_taken(logits: Floats, seed: int) -> None:
    for sampling in (Sampling(temperature=0.0, seed=seed), Sampling(temperature=1.0, top_k=1, seed=seed)):
        assert Sampler(sampling).draw(logits) == logits.argmax()


def test_logits_are_left_as_they_are() -> None:
    logits = np.linspace(-1, 1, 50, dtype=np.float32)
    kept, sampler = logits.copy(), Sampler(Sampling(seed=1))
    for _ in range(20):
        sampler.draw(logits)
    np.testing.assert_array_equal(kept, logits)


def probabilities(logits: Floats, temperature: float) -> NDArray[np.float64]:
    odds = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    share: NDArray[np.float64] = odds / odds.sum()
    return share


def drawn(logits: Floats, sampling: Sampling, count: int) -> set[int]:
    """The tokens that `count` independent draws give."""
    return {Sampler(replace(sampling, seed=seed)).draw(logits) for seed in range(count)}


@settings(max_examples=60)
@given(logits=SMALL, top_p=st.floats(0.01, 1.0), temperature=st.sampled_from([0.5, 1.0, 3.0]))
def test_top_p_keeps_the_smallest_set_that_reaches_it(logits: Floats, top_p: float, temperature: float) -> None:
    """Nothing outside of it is drawn: all that is drawn is as likely as its least likely member, or more."""
    share = np.sort(probabilities(logits, temperature))[::-1]
    n_kept = 1 + int((np.cumsum(share) < top_p - 1e-12).sum())
    least = share[min(n_kept, len(share)) - 1]
    sampling = replace(PLAIN, top_p=top_p, temperature=temperature)
    for token in drawn(logits, sampling, 30):
        assert probabilities(logits, temperature)[token] >= least * (1 - 1e-9)


def test_top_p_includes_the_token_that_reaches_it() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    kept = {top_p: drawn(logits, replace(PLAIN, top_p=top_p), 300) for top_p in (0.01, 0.45, 0.55, 0.79, 0.85, 1.0)}
    assert kept == {0.01: {0}, 0.45: {0}, 0.55: {0, 1}, 0.79: {0, 1}, 0.85: {0, 1, 2}, 1.0: {0, 1, 2, 3}}


def test_top_k_comes_before_top_p() -> None:
    """The share that top_p reaches for is that among the k."""
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    assert drawn(logits, replace(PLAIN, top_k=2, top_p=0.5), 300) == {0}
    assert drawn(logits, replace(PLAIN, top_k=0, top_p=0.5), 300) == {0, 1}
    assert drawn(logits, replace(PLAIN, top_k=3), 300) == {0, 1, 2}
    assert drawn(logits, replace(PLAIN, top_k=99), 300) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("change", "temperature", "kept"),
    [({}, 1.0, 6), ({"temperature": 0.5}, 0.5, 6), ({"temperature": 2.0}, 2.0, 6), ({"top_k": 3}, 1.0, 3)],
)
def test_tokens_come_as_often_as_the_model_says(change: dict[str, Any], temperature: float, kept: int) -> None:
    """Within five standard deviations of a binomial count."""
    logits = np.array([2.0, -1.0, 1.0, 0.5, 0.0, 1.5], np.float32)
    sampler = Sampler(replace(PLAIN, **change))
    counts = np.bincount([sampler.draw(logits) for _ in range(N_DRAWS)], minlength=len(logits))
    expected = probabilities(logits, temperature)
    expected[np.argsort(-logits)[kept:]] = 0
    expected /= expected.sum()
    deviation = np.sqrt(N_DRAWS * expected * (1 - expected))
    assert (np.abs(counts - N_DRAWS * expected) <= SIGMAS * deviation).all()


@given(logits=SMALL, penalty=st.floats(-2, 2, width=16))
def test_the_penalty_is_taken_off_what_was_drawn_once_each(logits: Floats, penalty: float) -> None:
    """However often it was drawn, and before the likeliest is taken."""
    sampler = Sampler(Sampling(temperature=0.0, presence_penalty=penalty))
    expected, seen = logits.copy(), set[int]()
    for _ in range(6):
        token = sampler.draw(logits)
        assert expected[token] == expected.max()
        if token not in seen:
            expected[token] -= np.float32(penalty)
            seen.add(token)


def test_a_digit_comes_again_by_default() -> None:
    """The second 1 of 11, of which the model is sure, is always drawn as a daemon draws; with a penalty it is not."""
    logits = np.full(1000, -10.0, np.float32)
    logits[:10] = -3.0  # the ten digits
    logits[1] = 0.0
    defaults = parse(iotd_pb2.AskRequest(question="?"), 0.0, 1.0, AskConfig()).sampling
    spoilt = replace(defaults, presence_penalty=1.5)

    def n_elevens(sampling: Sampling) -> int:
        samplers = [Sampler(replace(sampling, seed=seed)) for seed in range(400)]
        return sum([sampler.draw(logits), sampler.draw(logits)] == [1, 1] for sampler in samplers)

    assert n_elevens(defaults) == 400
    assert n_elevens(spoilt) < 350


def test_the_penalty_spares_what_comes_again_by_nature() -> None:
    logits = np.array([0.0, -1.0, -2.0], np.float32)
    sampler = Sampler(Sampling(temperature=0.0, presence_penalty=1.5), spared={0})
    assert [sampler.draw(logits) for _ in range(3)] == [0, 0, 0]


def test_an_answer_may_say_again_what_its_thought_said() -> None:
    logits = np.array([0.0, -1.0, -2.0], np.float32)
    sampler = Sampler(Sampling(temperature=0.0, presence_penalty=1.5), thinking=True)
    thought = [sampler.draw(logits) for _ in range(3)]
    sampler.begin_answer()
    assert thought == [sampler.draw(logits) for _ in range(3)] == [0, 1, 0]


def test_thoughts_are_drawn_in_a_way_of_their_own() -> None:
    """An answer without one, as the sampling says."""
    logits = np.zeros(1000, np.float32)
    greedy, free = Draw(0.0, 1.0, 0, 0.0), Draw(1.0, 1.0, 0, 0.0)
    for thoughts, answer, thinking in ((greedy, free, True), (free, greedy, True), (free, greedy, False)):
        sampling = Sampling(*(getattr(answer, name) for name in Draw.__slots__), seed=0, thoughts=thoughts)
        sampler = Sampler(sampling, thinking=thinking)
        first = {sampler.draw(logits) for _ in range(20)}
        if thinking:
            sampler.begin_answer()
        then = {sampler.draw(logits) for _ in range(20)}
        expected = (thoughts, answer) if thinking else (answer, answer)
        assert (len(first) == 1, len(then) == 1) == tuple(how is greedy for how in expected)


def test_the_same_seed_draws_the_same() -> None:
    logits = np.zeros(1000, np.float32)
    runs = [[Sampler(replace(PLAIN, seed=seed)).draw(logits) for seed in range(10)] for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 5


def test_without_a_seed_every_answer_has_its_own() -> None:
    logits = np.zeros(2**20, np.float32)
    assert len({Sampler(replace(PLAIN, seed=None)).draw(logits) for _ in range(8)}) > 1


@settings(max_examples=60)
@given(logits=SMALL, temperature=st.sampled_from([1e-4, 0.01, 100.0]))
def test_extreme_temperatures_draw_a_token(logits: Floats, temperature: float) -> None:
    """Without a warning of overflow."""
    assert 0 <= Sampler(replace(PLAIN, temperature=temperature)).draw(logits) < len(logits)


def test_tokens_that_are_forbidden_are_never_drawn() -> None:
    logits = np.array([0, -np.inf, 1, -np.inf], np.float32)
    assert drawn(logits, PLAIN, 200) == {0, 2}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("presence_penalty", float("nan")),
        ("seed", -1),
    ],
)
def test_an_option_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(InvalidInput, match=f"{name} is {value}: it must be") as caught:
        check_sampling(replace(Sampling(), **{name: value}))
    assert caught.value.field == f"sampling.{name}"


def test_the_defaults_are_in_range() -> None:
    check_sampling(Sampling())
