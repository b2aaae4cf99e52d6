"""Drafts from what was said, and answers that are the same with them as without."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iotd.errors import ContextOverflow, InvalidInput
from iotd.events import FinishReason, Sampling
from iotd.model import Model, State
from iotd.model.generation import Generation
from iotd.model.head import MOST_ROWS
from iotd.model.lookup import LEAST, Lookup

PROMPT = [7, 8, 9, 40, 41, 42, 43, 44, 45, 46, 47, 48, 7, 8, 9]


def test_what_followed_the_last_tokens_before_is_the_draft() -> None:
    assert Lookup(PROMPT).draft(4) == [40, 41, 42, 43]
    assert Lookup(PROMPT).draft(100) == PROMPT[3:]


def test_the_longest_match_counts_and_of_those_the_latest() -> None:
    assert Lookup([1, 2, 3, 10, 9, 2, 3, 11, 1, 2, 3]).draft(1) == [10]
    assert Lookup([1, 2, 3, 10, 1, 2, 3, 11, 1, 2, 3]).draft(1) == [11]


@pytest.mark.parametrize("said", [[], [5], [5, 5], [1, 2, 3, 4, 5, 6, 7]])
def test_what_was_not_said_before_has_no_draft(said: list[int]) -> None:
    assert Lookup(said).draft(4) == []


@given(first=st.lists(st.integers(0, 3), max_size=30), pieces=st.lists(st.lists(st.integers(0, 3)), max_size=6))
def test_said_at_once_or_in_pieces_is_the_same(first: list[int], pieces: list[list[int]]) -> None:
    lookup = Lookup(first)
    for piece in pieces:
        lookup.extend(piece)
    said = first + [token for piece in pieces for token in piece]
    draft = lookup.draft(5)
    assert draft == Lookup(said).draft(5)
    if draft:
        ends = [at for at in range(LEAST, len(said)) if said[at - LEAST : at] == said[-LEAST:]]
        assert any(said[at : at + 5] == draft for at in ends)


@pytest.fixture(scope="module")
def model(tiny_package: Path) -> Model:
    return Model.open(tiny_package, threads=1)


def state_of(model: Model, capacity: int = 200) -> tuple[State, np.ndarray]:
    state = model.new_state(capacity)
    logits = model.prefill(state, PROMPT)
    return state, logits


def test_verifying_leaves_the_state_and_reads_beside_it(model: Model) -> None:
    (state, _), (plain, _) = state_of(model), state_of(model)
    beside = model.new_state(0)
    rows = model._decoder.verify(state, beside, [1, 2, 3], 2).copy()
    one_by_one = [model.step(plain, token).copy() for token in (1, 2, 3)]
    np.testing.assert_allclose(rows, one_by_one[1:], atol=1e-3)
    assert (state.position, beside.position, beside.rope_position) == (15, 18, 18)
    beside.take_rows()
    np.testing.assert_allclose(model.step(beside, 4), model.step(plain, 4), atol=1e-3)
    (again, _) = state_of(model)
    np.testing.assert_array_equal(model.step(state, 5), model.step(again, 5))


def test_too_much_is_not_verified(model: Model) -> None:
    state, _ = state_of(model, capacity=len(PROMPT) + 2)
    with pytest.raises(ContextOverflow):
        model._decoder.verify(state, model.new_state(0), [1, 2, 3], 1)
    state, _ = state_of(model)
    with pytest.raises(InvalidInput, match="at most 8 of 128 are verified at once"):
        model._decoder.verify(state, model.new_state(0), [1] * (MOST_ROWS + 1), MOST_ROWS + 1)
    assert state.position == len(PROMPT)


def run(generation: Generation) -> tuple[str, int]:
    text, runs = "", 0
    while not generation.done:
        text += generation.step().answer
        runs += 1
    return text + generation.flush().answer, runs


GREEDY = Sampling(temperature=0.0, presence_penalty=0.0, max_tokens=40)


@pytest.mark.parametrize("lend", [False, True])
def test_an_answer_that_was_foreseen_takes_fewer_runs_and_ends_in_the_same_state(model: Model, lend: bool) -> None:
    (state, logits), (plain, _) = state_of(model), state_of(model)
    expected = model.generation(plain, logits, GREEDY)
    text, runs = run(expected)
    said = expected.unread
    answer_ids = ids_of(model, GREEDY)
    if lend:
        owner, state = state, model.new_state(0)
        owner.lend_to(state)
    generation = model.generation(state, logits, GREEDY, said=[*PROMPT, *answer_ids, *PROMPT])
    found, fewer = run(generation)
    assert (found, generation.n_tokens, generation.finish_reason) == (text, 40, FinishReason.LENGTH)
    assert fewer < runs / 2
    left = generation.state.position + len(generation.unread)
    assert left == plain.position + len(said)
    unread = generation.unread
    for token in unread[:-1]:
        model.step(generation.state, token)
    np.testing.assert_allclose(model.step(generation.state, unread[-1]), model.step(plain, said[-1]), atol=2e-3)


def ids_of(model: Model, sampling: Sampling) -> list[int]:
    state, logits = state_of(model)
    generation = model.generation(state, logits, sampling)
    drawn = []
    while not generation.done:
        generation.step()
        drawn += generation.unread
    return drawn


@settings(max_examples=40)
@given(data=st.data(), seed=st.integers(0, 1000), temperature=st.sampled_from([0.0, 0.8]))
def test_whatever_is_guessed_the_answer_is_the_same(model: Model, data: Any, seed: int, temperature: float) -> None:
    """Right guesses, wrong ones, and mixtures of both; greedy and drawn."""
    sampling = Sampling(
        temperature=temperature, presence_penalty=0.5, seed=seed, max_tokens=data.draw(st.integers(1, 30))
    )
    drawn = ids_of(model, sampling)
    noise = data.draw(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 255)), max_size=6))
    guessed = [*PROMPT, *drawn]
    for at, token in noise:
        if len(PROMPT) + at < len(guessed):
            guessed[len(PROMPT) + at] = token
    capacity = data.draw(st.sampled_from([200, len(PROMPT) + 5]))
    (state, logits), (plain, _) = state_of(model, capacity), state_of(model, capacity)
    without = model.generation(plain, logits, sampling)
    generation = model.generation(state, logits, sampling, said=[*guessed, *PROMPT])
    assert run(generation)[0] == run(without)[0]
    assert (generation.n_tokens, generation.finish_reason) == (without.n_tokens, without.finish_reason)
    assert generation.state.position + len(generation.unread) == plain.position + len(without.unread)


def test_an_answer_that_ends_in_a_draft_leaves_out_what_comes_behind(model: Model) -> None:
    (state, logits), (plain, _) = state_of(model), state_of(model)
    text, _ = run(model.generation(plain, logits, GREEDY))
    sampling = replace(GREEDY, stop=(text[6:9],))
    generation = model.generation(state, logits, sampling, said=[*PROMPT, *ids_of(model, GREEDY), *PROMPT])
    assert run(generation)[0] == text.partition(text[6:9])[0]
    assert generation.finish_reason is FinishReason.STOP
