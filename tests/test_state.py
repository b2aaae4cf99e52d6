"""The laws of a state: forks, resets and copies, positions behind images, and refusals that leave it as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from iotd.convert.convert import convert_random
from iotd.errors import ContextOverflow, InvalidInput, StateMismatch
from iotd.model import Model, State

IMAGE = np.random.default_rng(0).integers(0, 256, (256, 320, 3), dtype=np.uint8)
TOKENS = st.lists(st.integers(0, 319), min_size=1, max_size=20)
Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def model(tiny_package: Path) -> Model:
    return Model.open(tiny_package, threads=1)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Of the same shape, with other weights."""
    folder = tmp_path_factory.mktemp("packages") / "other"
    convert_random("tiny", folder, recipe="fp32", seed=1)
    return Model.open(folder, threads=1)


def read_image(model: Model, state: State) -> None:
    model.prefill_embeddings(state, model.encode_image(IMAGE), grid=model.image_grid(IMAGE.shape))


def content(state: State) -> dict[str, Any]:
    """All that a state holds, of the key/value cache only what is in use."""
    used = {
        name: tensor[:, :, : state.position].copy() if name.startswith(("key.", "value.")) else tensor.copy()
        for name, tensor in state.tensors.items()
    }
    return {"position": state.position, "rope_position": state.rope_position, **used}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@settings(max_examples=20)
@given(before=TOKENS, after=TOKENS)
def test_a_copy_goes_on_as_if_it_had_never_left(model: Model, before: list[int], after: list[int]) -> None:
    """Bit for bit: the logits of one state that reads both are those of a copy taken in between."""
    state = model.new_state(64)
    model.prefill(state, before, logits=False)
    fork = state.copy()
    expected = model.prefill(state, after)
    np.testing.assert_array_equal(expected, model.prefill(fork, after))
    assert_same(content(state), content(fork))


@settings(max_examples=20)
@given(before=TOKENS, after=TOKENS)
def test_a_fork_never_changes_its_parent(model: Model, before: list[int], after: list[int]) -> None:
    state = model.new_state(64)
    model.prefill(state, before, logits=False)
    kept = content(state)
    fork = state.copy()
    model.prefill(fork, after, logits=False)
    model.step(fork, after[0])
    assert_same(kept, content(state))


@settings(max_examples=20)
@given(before=TOKENS, after=TOKENS, later=TOKENS)
def test_a_lent_fork_goes_on_as_a_copy_does_and_leaves_its_parent_alone(
    model: Model, before: list[int], after: list[int], later: list[int]
) -> None:
    state, fork = model.new_state(64), model.new_state(0)
    model.prefill(state, before, logits=False)
    alone, kept = state.copy(), content(state)
    for _ in range(2):
        state.lend_to(fork)
        np.testing.assert_array_equal(model.prefill(alone.copy(), after), model.prefill(fork, after))
        assert_same(kept, content(state))
    saved = model.new_state(64)
    fork.copy_into(saved)
    expected = model.prefill(fork, later)
    np.testing.assert_array_equal(model.prefill(alone, later), model.prefill(state, later))
    assert_same(content(alone), content(state))
    np.testing.assert_array_equal(expected, model.prefill(saved, later))


def test_a_fork_whose_rows_were_taken_back_is_not_run(model: Model) -> None:
    state, first, second = model.new_state(64), model.new_state(0), model.new_state(0)
    for take_back in (lambda: state.lend_to(second), lambda: model.prefill(state, [7])):
        state.lend_to(first)
        model.prefill(first, [1, 2])
        take_back()
        with pytest.raises(StateMismatch, match="taken back"):
            model.prefill(first, [3])


def test_a_fork_takes_no_rows_of_its_own_and_none_before_it_is_lent_to(model: Model) -> None:
    state, fork = model.new_state(64), model.new_state(0)
    assert fork.nbytes == model.new_state(1000).nbytes - 1000 * (state.nbytes - fork.nbytes) // 64
    with pytest.raises(ContextOverflow):
        model.prefill(fork, [1])
    state.lend_to(fork)
    assert fork.capacity == 64
    model.prefill(fork, [1] * 64)


def test_a_parent_never_changes_its_fork(model: Model) -> None:
    """Even though the parent's buffers are bound to the graph and go on being used."""
    state = model.new_state(64)
    model.prefill(state, [1, 2, 3], logits=False)
    fork = state.copy()
    kept = content(fork)
    model.prefill(state, [4, 5], logits=False)
    read_image(model, model.new_state(128))
    state.reset()
    assert_same(kept, content(fork))


@settings(max_examples=20)
@given(first=TOKENS, second=TOKENS, after=TOKENS, capacity=st.integers(40, 90))
def test_copy_into_leaves_nothing_of_what_was_there(
    model: Model, first: list[int], second: list[int], after: list[int], capacity: int
) -> None:
    """Into a larger or smaller state that has read something longer or shorter."""
    state, target = model.new_state(64), model.new_state(capacity)
    model.prefill(target, second, logits=False)
    model.prefill(state, first, logits=False)
    state.copy_into(target)
    assert_same(content(state), content(target))
    assert target.capacity == capacity
    np.testing.assert_array_equal(model.prefill(state, after), model.prefill(target, after))


def test_copy_into_a_state_just_large_enough(model: Model) -> None:
    state, target = model.new_state(64), model.new_state(3)
    model.prefill(state, [1, 2, 3], logits=False)
    state.copy_into(target)
    assert target.available == 0
    assert_same(content(state), content(target))


def test_copy_into_a_state_that_is_too_small_is_refused(model: Model) -> None:
    """And leaves it as it was."""
    state, target = model.new_state(64), model.new_state(3)
    model.prefill(state, [1, 2, 3, 4], logits=False)
    model.prefill(target, [9], logits=False)
    kept = content(target)
    with pytest.raises(StateMismatch, match="capacity 3 cannot take the 4 tokens"):
        state.copy_into(target)
    assert_same(kept, content(target))


def test_states_of_two_models_do_not_mix(model: Model, other_model: Model) -> None:
    """Even where the two have one shape: what one has read means nothing to the other."""
    state, foreign = model.new_state(128), other_model.new_state(128)
    image = model.encode_image(IMAGE)
    other_model.prefill(foreign, [1, 2], logits=False)
    kept = content(foreign)
    attempts: list[Callable[[], object]] = [
        lambda: foreign.copy_into(state),
        lambda: state.copy_into(foreign),
        lambda: model.prefill(foreign, [1]),
        lambda: model.step(foreign, 1),
        lambda: model.prefill_embeddings(foreign, image, grid=model.image_grid(IMAGE.shape)),
    ]
    for attempt in attempts:
        with pytest.raises(StateMismatch, match="model"):
            attempt()
    assert_same(kept, content(foreign))
    assert state.position == 0


@settings(max_examples=20)
@given(before=TOKENS, after=TOKENS)
def test_a_reset_state_is_a_new_one(model: Model, before: list[int], after: list[int]) -> None:
    used, new = model.new_state(64), model.new_state(64)
    model.prefill(used, before, logits=False)
    used.reset()
    assert_same(content(new), content(used))
    np.testing.assert_array_equal(model.prefill(new, after), model.prefill(used, after))
    assert_same(content(new), content(used))


def test_memory_is_constant_after_many_steps(model: Model) -> None:
    """All of it is there from the start, at addresses that never change."""
    state = model.new_state(700)
    nbytes = state.nbytes
    assert nbytes == sum(tensor.nbytes for tensor in state.tensors.values())
    addresses = {name: tensor.ctypes.data for name, tensor in state.tensors.items()}
    model.prefill(state, [1] * 200, logits=False)
    for token in range(500):
        model.step(state, token % 256)
    assert state.nbytes == nbytes
    assert addresses == {name: tensor.ctypes.data for name, tensor in state.tensors.items()}
    assert (state.position, state.available) == (700, 0)


def test_capacity_costs_the_cache_of_full_attention_only(model: Model) -> None:
    spec = model.spec
    full = spec.layers.count("full")
    row = full * 2 * spec.num_kv_heads * spec.head_dim * 4
    assert model.new_state(100).nbytes - model.new_state(1).nbytes == 99 * row


def test_a_state_without_room_is_refused(model: Model) -> None:
    for capacity in (-1, model.spec.max_positions + 1):
        with pytest.raises(InvalidInput, match=f"0 to {model.spec.max_positions} tokens, not {capacity}"):
            model.new_state(capacity)


def test_an_image_takes_fewer_positions_than_tokens(model: Model) -> None:
    """Its tokens stand side by side: it spans the longer side of its grid, and copies keep that in mind."""
    state = model.new_state(128)
    model.prefill(state, [1, 2, 3], logits=False)
    read_image(model, state)
    assert model.image_grid(IMAGE.shape) == (1, 16, 20)
    assert (state.position, state.rope_position) == (3 + 8 * 10, 3 + 10)
    model.step(state, 5)
    assert (state.position, state.rope_position) == (84, 14)
    assert state.copy().rope_position == 14
    state.reset()
    assert (state.position, state.rope_position) == (0, 0)


def test_a_copy_behind_an_image_goes_on_as_if_it_had_never_left(model: Model) -> None:
    state = model.new_state(128)
    read_image(model, state)
    fork = state.copy()
    np.testing.assert_array_equal(model.prefill(state, [1, 2]), model.prefill(fork, [1, 2]))


def test_an_overflow_is_told_before_anything_runs(model: Model) -> None:
    """By a prefill, even of several runs, by an image, and by a step."""
    state, full = model.new_state(10), model.new_state(7)
    model.prefill(state, [1, 2, 3, 4, 5, 6, 7], logits=False)
    state.copy_into(full)
    kept = content(state)
    embeddings, grid = model.encode_image(IMAGE), model.image_grid(IMAGE.shape)
    attempts: list[Callable[[], object]] = [
        lambda: model.prefill(state, [1, 2, 3, 4]),
        lambda: model.prefill(state, [1] * 500),
        lambda: model.prefill_embeddings(state, embeddings, grid=grid),
        lambda: model.step(full, 1),
    ]
    for attempt in attempts:
        with pytest.raises(ContextOverflow):
            attempt()
    assert_same(kept, content(state))
    assert_same(kept, content(full))


def test_an_overflow_tells_how_much_is_left(model: Model) -> None:
    state = model.new_state(10)
    model.prefill(state, [1] * 8, logits=False)
    with pytest.raises(ContextOverflow, match="needs 3 tokens and 2 are free") as caught:
        model.prefill(state, [1, 2, 3])
    assert (caught.value.needed, caught.value.available) == (3, 2)


def test_an_image_may_be_read_in_parts(model: Model) -> None:
    """Rows that follow each other give the state and the logits of the whole image at once."""
    embeddings, grid = model.encode_image(IMAGE), model.image_grid(IMAGE.shape)
    whole, parts = model.new_state(128), model.new_state(128)
    model.prefill_embeddings(whole, embeddings, grid=grid)
    for start in range(0, len(embeddings), 32):
        model.prefill_embeddings(parts, embeddings, grid=grid, rows=slice(start, start + 32))
    assert (parts.position, parts.rope_position) == (whole.position, whole.rope_position)
    np.testing.assert_allclose(model.prefill(parts, [1, 2]), model.prefill(whole, [1, 2]), atol=1e-5)


@pytest.mark.parametrize("ids", [[], [320], [-1], [1, 2, 10**9], [[1, 2]], [1.7], "abc"])
def test_ids_that_are_none_change_nothing(model: Model, ids: list[int]) -> None:
    state = model.new_state(10)
    model.prefill(state, [1, 2], logits=False)
    kept = content(state)
    with pytest.raises(InvalidInput):
        model.prefill(state, ids)
    for token in ids:
        if isinstance(token, int) and not 0 <= token < 320:
            with pytest.raises(InvalidInput, match="outside of the vocabulary of 320"):
                model.step(state, token)
    assert_same(kept, content(state))


def test_embeddings_that_do_not_fit_their_grid_change_nothing(model: Model) -> None:
    state = model.new_state(128)
    embeddings, grid = model.encode_image(IMAGE), model.image_grid(IMAGE.shape)
    for wrong in (embeddings[:-1], embeddings[:, :1], embeddings[0], np.concatenate([embeddings, embeddings])):
        with pytest.raises(InvalidInput, match=r"embeddings of the grid \(1, 16, 20\) are \[80, 96\]"):
            model.prefill_embeddings(state, wrong, grid=grid)
    assert_same(content(model.new_state(128)), content(state))
