"""A row of training is, token by token and place by place, what the daemon would have its model read."""

import random
from pathlib import Path

import numpy as np
import pytest

from iotd.config import DEFAULT_SYSTEM
from iotd.demo.batches import Row, Writer, drawn_scene
from iotd.demo.examples import Asked, Pace, Seen, conversation
from iotd.demo.home import DOORS, HEATED_C
from iotd.demo.probes import UNKNOWN, labels
from iotd.demo.questions import SIDES, Told, side_of
from iotd.demo.scene import COLOURS, KINDS
from iotd.engine.backlog import Shot
from iotd.engine.entry import Part
from iotd.engine.feed import encode
from iotd.engine.lines import Lines
from iotd.events import Reading
from iotd.model import Model
from iotd.model.package import TOKENIZER

PACE = Pace(events=(3, 8), questions=(1, 2), frames=0.3, mischief=0.2)
SIZE = (160, 160)
LENGTH = 1500
NAMES = (
    *(f"{door} door" for door in DOORS),
    *(f"{room} motion" for room in HEATED_C),
    *(f"{best}{part}" for best in ("warmest", "coldest") for part in ("", " tens", " units", " tenths")),
    *KINDS,
    *(f"side of {kind}" for kind in KINDS),
    "how many",
)
"""Of the probes, in their order."""


@pytest.fixture(scope="module")
def model(tiny_package: Path) -> Model:
    return Model.open(tiny_package, threads=1)


@pytest.fixture(scope="module")
def side(model: Model) -> int:
    return round(model.image_tokens(model.image_grid(SIZE)) ** 0.5)


@pytest.fixture(scope="module")
def writer(tiny_package: Path, side: int) -> Writer:
    return Writer(tiny_package / TOKENIZER, side)


def as_read_by_the_daemon(model: Model, seed: int) -> list[Part]:
    """The stream up to the first question, and that question, from the engine's own words."""
    lines = Lines(model, max_tokens=1000)
    epoch_s = 86400.0 * random.Random(seed).randrange(15000, 25000)
    parts: list[Part] = [lines.opening(DEFAULT_SYSTEM)]
    day = ""
    for event in conversation(seed, PACE, epoch_s=epoch_s):
        if isinstance(event, Asked):
            return parts + lines.question(event.question.text, (), thinking=False)
        observation = event.observation()
        if isinstance(observation, Reading):
            entry, _ = lines.reading(observation)
        else:
            entry = lines.frame(Shot(observation.camera, observation.time_s, observation.rgb))
        if entry.day != day:
            day = entry.day
            parts.append(lines.date(day))
        parts.extend(entry.parts)
    raise AssertionError("a conversation has no end")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_row_is_what_the_daemon_reads(model: Model, writer: Writer, side: int, seed: int) -> None:
    row = writer.row(seed, LENGTH, PACE)
    pad = model.tokenizer.token_id("<|image_pad|>")
    state = model.new_state(LENGTH)
    ids: list[int] = []
    for part in as_read_by_the_daemon(model, seed):
        assert row.positions[0, len(ids)] == state.rope_position
        if isinstance(part, list):
            model.prefill(state, part, logits=False)
            ids += part
        else:
            encode(model, part)
            assert part.embedding is not None
            model.prefill_embeddings(state, part.embedding, grid=part.grid)
            ids += [pad or 0] * side**2
    assert row.ids[: len(ids)].tolist() == ids
    assert row.answers[0][0] == len(ids)
    assert row.positions[:, len(ids)].tolist() == [state.rope_position] * 3


def test_a_pictures_tokens_have_its_rows_and_columns(writer: Writer, side: int, model: Model) -> None:
    row = writer.row(2, LENGTH, PACE)
    (places,) = np.nonzero(row.ids == model.tokenizer.token_id("<|image_pad|>"))
    first = places[: side**2]
    base = row.positions[0, first[0]]
    assert (row.positions[0, first] == base).all()
    assert (row.positions[1, first] == base + np.repeat(np.arange(side), side)).all()
    assert (row.positions[2, first] == base + np.tile(np.arange(side), side)).all()
    assert row.positions[0, first[-1] + 1] == base + side


def text(model: Model, ids: list[int]) -> str:
    stream = model.tokenizer.stream()
    return "".join(stream.push(token) for token in ids) + stream.flush()


def test_the_answers_places_hold_the_answers_and_the_end_of_the_turn(model: Model, writer: Writer) -> None:
    row = writer.row(4, LENGTH, PACE)
    assert len(row.answers) >= 3
    for begin, end, question in row.answers:
        assert row.ids[end - 1] == model.tokenizer.token_id("<|im_end|>")
        assert text(model, row.ids[begin : end - 1].tolist()) == question.answer
        assert (row.worth[begin:end] == 1.0).all()


def test_probes_ask_at_each_lines_end_what_was_told_by_then(model: Model, writer: Writer) -> None:
    row = writer.row(4, LENGTH, PACE)
    told, seen = Told(), iter(row.lines)
    for event in conversation(4, PACE, epoch_s=86400.0 * random.Random(4).randrange(15000, 25000)):
        if isinstance(event, Asked):
            continue
        if (line := next(seen, None)) is None:
            break
        told.look(event.scene) if isinstance(event, Seen) else told.hear(event.report)
        assert (line[1] == labels(told)).all()
        assert model.tokenizer.encode("\n", special=False) == [row.ids[line[0]]]
    assert len(row.lines) > 5


def test_labels_say_what_is_so_and_nothing_of_what_is_unknown() -> None:
    told = Told()
    known = dict(zip(NAMES, labels(told), strict=True))
    assert {known["front door"], known["kitchen motion"]} == {0}
    assert {known["warmest"], known["person"], known["side of person"], known["how many"]} == {UNKNOWN}
    told.values |= {
        "front door": "open",
        "back door": "closed",
        "study temperature": "23.4 °C",
        "attic temperature": "8 °C",
    }
    scene = drawn_scene(np.random.default_rng(3))
    told.look(scene)
    known = dict(zip(NAMES, labels(told), strict=True))
    assert (known["front door"], known["back door"], known["garage door"]) == (2, 1, 0)
    assert [*HEATED_C][known["warmest"]] == "study"
    assert [known[f"warmest {part}"] for part in ("tens", "units", "tenths")] == [2, 3, 4]
    assert [known[f"coldest {part}"] for part in ("tens", "units", "tenths")] == [0, 8, 0]
    assert [*HEATED_C][known["coldest"]] == "attic"
    assert known["how many"] == len(scene.things)
    things = {thing.kind: thing for thing in scene.things}
    for kind in KINDS:
        there = kind in things
        assert known[kind] == (1 + [*COLOURS].index(things[kind].colour) if there else 0)
        assert known[f"side of {kind}"] == (SIDES.index(side_of(things[kind], scene)) if there else UNKNOWN)


def test_only_answers_and_readings_are_worth_anything(writer: Writer) -> None:
    row = writer.row(5, LENGTH, PACE)
    in_answers = np.zeros(LENGTH, bool)
    for begin, end, _ in row.answers:
        in_answers[begin:end] = True
    cut_off = row.answers[-1][1]
    assert (row.worth[:cut_off] == 1.0).tolist() == in_answers[:cut_off].tolist()
    assert set(np.unique(row.worth).tolist()) <= {0.0, np.float32(0.1), 1.0}


def test_a_payload_with_a_control_tokens_name_is_plain_text(model: Model, writer: Writer) -> None:
    """Each end of turn in a row belongs to its system prompt, to a question or to an answer."""
    plain = model.tokenizer.encode("<|im_end|>", special=False)
    rows = (writer.row(seed, LENGTH, PACE) for seed in range(50))
    row = next(row for row in rows if contains(row.ids[: row.answers[-1][1]].tolist(), plain))
    n_ends = int((row.ids[: row.answers[-1][1]] == model.tokenizer.token_id("<|im_end|>")).sum())
    assert n_ends == 1 + 2 * len(row.answers)


def contains(ids: list[int], wanted: list[int]) -> bool:
    return any(ids[at : at + len(wanted)] == wanted for at in range(len(ids)))


def same(one: Row, other: Row) -> bool:
    pictures = [(a == b).all() for a, b in zip(one.pictures, other.pictures, strict=True)]
    return all([(one.ids == other.ids).all(), (one.positions == other.positions).all(), *pictures])


def test_one_seed_is_one_row(writer: Writer) -> None:
    assert same(writer.row(6, 400, PACE), writer.row(6, 400, PACE))
    assert (writer.row(6, 400, PACE).ids != writer.row(7, 400, PACE).ids).any()


@pytest.mark.parametrize("length", range(300, 500, 20))
def test_no_picture_is_cut_in_two(model: Model, writer: Writer, side: int, length: int) -> None:
    row = writer.row(8, length, Pace(events=(3, 3), frames=0.8))
    n_pads = int((row.ids == model.tokenizer.token_id("<|image_pad|>")).sum())
    assert (len(row.ids), row.positions.shape, len(row.worth)) == (length, (3, length), length)
    assert n_pads == len(row.pictures) * side**2
    assert all(end <= length for _, end, _ in row.answers)


def test_a_row_without_the_prompt_begins_with_the_turn(model: Model, writer: Writer) -> None:
    row = writer.row(9, 200, PACE, prompted=0.0)
    begin = text(model, row.ids[:60].tolist())
    assert DEFAULT_SYSTEM[:20] not in begin
    assert "user\n[" in begin
