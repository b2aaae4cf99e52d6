"""A plan fits into its time: images, thoughts and length give way to it in turn."""

from dataclasses import replace

import pytest
from engine_driver import ManualClock

from iotd.engine.costs import Costs
from iotd.engine.lengths import MOST_SENTENCE, Lengths
from iotd.engine.plan import ANSWER_SHARE, LEAST_TOKENS, Picture, Planner, Work

STEP_S, TOKEN_S, IMAGE_S = 0.05, 0.01, 0.02
CHUNK_TOKENS = 32


@pytest.fixture
def planner() -> Planner:
    clock = ManualClock()
    costs = Costs(clock)
    for n_tokens in (8, 32, 8, 32):
        with costs.read(n_tokens, 0):
            clock.now_s += n_tokens * TOKEN_S
    for _ in range(20):
        with costs.step(0):
            clock.now_s += STEP_S
        with costs.image(64):
            clock.now_s += 64 * IMAGE_S
    return Planner(costs, Lengths(), CHUNK_TOKENS)


def text(*parts: int | Picture, max_tokens: int = 256, thinking: bool = False) -> Work:
    return Work("text", 0, parts or (20,), max_tokens, thinking)


def test_an_answer_has_as_many_tokens_as_there_is_time_for(planner: Planner) -> None:
    for time_s in (1.0, 2.0, 5.0):
        planned = planner.fit(text(), time_s)
        assert planned is not None
        plan = planned.plan
        assert plan.predicted.total_s <= time_s
        assert plan.predicted.total_s > time_s - 2 * STEP_S
        assert plan.predicted.prefill_s == pytest.approx(20 * TOKEN_S, rel=0.05)


def test_no_more_than_max_tokens_and_the_room_there_is(planner: Planner) -> None:
    found = planner.fit(text(max_tokens=7), 60.0)
    assert found is not None and found.plan.answer_tokens == 7
    found = planner.fit(Work("text", 0, (20,), 256, room=50), 60.0)
    assert found is not None and found.plan.answer_tokens == 30


def test_what_leaves_no_time_for_the_least_answer_has_no_plan(planner: Planner) -> None:
    least_s = planner.least(text()).least_s
    assert least_s == pytest.approx(20 * TOKEN_S + LEAST_TOKENS * STEP_S, rel=0.3)
    assert planner.fit(text(), 0.99 * least_s) is None
    assert planner.fit(text(), 1.01 * least_s) is not None


def test_the_model_is_told_how_long_its_answer_may_be_unless_there_is_ample_time(planner: Planner) -> None:
    work = replace(text(), hint_tokens=10)
    hinted, ample = (planner.fit(work, 20 * TOKEN_S + n * STEP_S) for n in (30, 40))
    assert hinted is not None and ample is not None
    assert (hinted.hint, ample.hint) == (True, False)
    assert hinted.plan.predicted.prefill_s == pytest.approx(30 * TOKEN_S, rel=0.05)
    least_s = planner.least(work).least_s
    assert least_s == pytest.approx(30 * TOKEN_S + LEAST_TOKENS * STEP_S, rel=0.3)
    assert planner.fit(work, 0.99 * least_s) is None
    least = planner.fit(work, 1.01 * least_s)
    assert least is not None and least.hint


def test_images_are_made_smaller_before_the_answer_is_made_short(planner: Planner) -> None:
    work = text(10, Picture((64, 32, 16), n_fine=3), 20)
    sizes = []
    for time_s in (60.0, 3.0, 2.2, 1.4):
        planned = planner.fit(work, time_s)
        assert planned is not None
        assert planned.plan.predicted.total_s <= time_s
        sizes.append(planned.plan.image_tokens)
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (64, 16)


def test_sizes_that_the_model_is_not_made_for_are_taken_where_there_is_no_answer_otherwise(planner: Planner) -> None:
    fine, coarse = text(10, Picture((64,)), 20), text(10, Picture((64, 32, 16)), 20)
    tokens = set()
    for n in range(5, 300):
        only, planned = planner.fit(fine, n / 100), planner.fit(coarse, n / 100)
        if only is not None:
            assert planned == only
        elif planned is not None:
            tokens.add(planned.plan.image_tokens)
    assert tokens == {32, 16}


def test_an_image_that_is_encoded_costs_its_tokens_alone(planner: Planner) -> None:
    planned = planner.fit(text(Picture((64,), encoded=True), 20), 60.0)
    assert planned is not None
    assert planned.plan.predicted.image_s == 0
    assert planned.plan.predicted.prefill_s == pytest.approx(84 * TOKEN_S, rel=0.1)


def test_thoughts_leave_room_for_the_answer_and_are_left_out_where_there_is_none(planner: Planner) -> None:
    for time_s in (0.6, 1.0, 2.0, 10.0, 60.0):
        planned = planner.fit(text(thinking=True), time_s)
        assert planned is not None
        plan = planned.plan
        assert plan.answer_tokens >= ANSWER_SHARE * (plan.answer_tokens + plan.thinking_tokens)
        assert plan.predicted.total_s <= time_s
    assert plan.answer_tokens + plan.thinking_tokens == 256
    short = planner.fit(text(thinking=True), 1.0)
    assert short is not None and short.plan.thinking_tokens == 0


def test_what_is_kept_is_no_more_than_answers_usually_take(planner: Planner) -> None:
    planned = planner.fit(text(), 60.0)
    assert planned is not None
    assert planned.plan.answer_tokens == 256
    assert planned.plan.reserved_tokens == 24
    assert planned.reserved_s == pytest.approx(20 * TOKEN_S + 24 * STEP_S, rel=0.1)


def test_labels_need_no_more_than_the_prompt_and_their_own_runs(planner: Planner) -> None:
    planned = planner.fit(Work("labels", 0, (20,), 0, beside=(3, 3)), 60.0)
    assert planned is not None
    assert planned.plan.answer_tokens == 0
    assert planned.first_s == pytest.approx(26 * TOKEN_S, rel=0.1)
    assert planned.reserved_s == planned.least_s


def test_the_usual_length_follows_the_answers() -> None:
    lengths = Lengths()
    for _ in range(80):
        lengths.learn("text", 10)
    assert lengths.usual("text") == 10
    for n in range(80):
        lengths.learn("text", 10 + 40 * (n % 2))
    assert lengths.usual("text") == 50


def test_sentences_that_were_cut_count_as_longer_than_what_was_said() -> None:
    lengths = Lengths()
    for _ in range(64):
        lengths.learn_sentence(10, whole=True)
    assert lengths.sentence == 10
    for _ in range(30):
        lengths.learn_sentence(4, whole=False)
    assert lengths.sentence == 10
    for n in range(64):
        lengths.learn_sentence(12 if n % 2 else 20, whole=n % 4 != 0)
    assert lengths.sentence == 20


def test_a_model_that_ends_no_sentence_has_no_more_kept_for_it_than_a_long_one_takes() -> None:
    lengths = Lengths()
    for _ in range(100):
        lengths.learn_sentence(200, whole=False)
    assert lengths.sentence == MOST_SENTENCE
