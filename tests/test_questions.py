"""Questions are answered from what was told, and answers are judged by what they say, strictly and fairly."""

import itertools
import json
import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iotd.demo.devices import Report
from iotd.demo.questions import KIND_WEIGHTS, NO_READING, Question, Told, draw_question
from iotd.demo.scene import Scene, Thing

VALUES = {
    "kitchen temperature": "21.4 °C",
    "lounge temperature": "19.0 °C",
    "bedroom temperature": "17 °C",
    "bedroom humidity": "44 %",
    "washer power": "316 W",
    "front door": "open",
    "back door": "closed",
    "garage door": "closed",
    "kitchen motion": "detected",
    "lounge motion": "clear",
}
DARK = np.zeros((100, 100, 3), np.uint8)
EMPTY = Scene(DARK, (), 1.0)
DOG_AND_CAR = Scene(DARK, (Thing("dog", "red", (0, 60, 20, 80)), Thing("car", "blue", (70, 50, 98, 80))), 1.0)
NOISE = ("", ".", "9", "[[[[", "\x00�", "oo kitchn", "The", "{}", "null", "of the of the of the", "1 2 3 4 5 6 7 8 9")
EVERYTHING = (
    "kitchen lounge hallway bedroom bathroom garage study nursery attic cellar fridge kettle washer front back "
    "person dog car parcel bicycle red blue green yellow white black left middle right"
)


def drawn(
    kind: str, text: str = "", *, form: str = "sentence", scene: Scene = DOG_AND_CAR, limit: bool = False
) -> Question:
    """The first question of this kind with `text` in it. limit: with a limit of words, or else without."""
    told = Told(dict(VALUES), scene)
    for seed in range(20_000):
        question = draw_question(told, random.Random(seed), weights={kind: 1.0})
        if text in question.text and question.form == form and (question.max_words is not None) == limit:
            return question
    raise AssertionError(f"no {form} question of kind {kind!r} with {text!r}")


@pytest.mark.parametrize(
    ("kind", "text", "right", "wrong"),
    [
        (
            "value",
            "temperature in the kitchen",
            ["The kitchen temperature is 21.4 °C.", "21.4 °C", "21.4", "21.40 °C.", "At 14:03:05 it was 21.4 °C"],
            [
                "21.5 °C",
                "The lounge temperature is 21.4 °C.",
                "The kitchen.",
                "21.4 %",
                "21.4 W",
                "21",
                NO_READING,
                "21.4 °C or 19 °C",
                "Yes.",
                "-21.4 °C",
                "21.4 °C in the kitchen and the lounge",
                "It is not 21.4 °C.",
            ],
        ),
        ("value", "humid is it in the bedroom", ["The bedroom humidity is 44 %.", "44 %"], ["44 °C", "17 °C", "44 W"]),
        ("value", "does the washer draw", ["The washer power is 316 W.", "316 W.", "316W"], ["0 W", "316 %", "316 °C"]),
        (
            "state",
            "Is the front door open?",
            ["Yes, the front door is open.", "Yes.", "yes", "Yes!", "It is open: the front door is open."],
            [
                "No.",
                "No, the front door is closed.",
                "Yes, the front door is closed.",
                "Yes, the back door is open.",
                "Yes, it is not open.",
                "Yes, the front door is open. No, the front door is closed.",
                NO_READING,
                "None.",
            ],
        ),
        (
            "state",
            "Is the back door closed?",
            ["Yes, the back door is closed.", "Yes.", "Yes, it is shut.", "The back door is not open."],
            ["No.", "Yes, the back door is open.", "No, the back door is closed.", "The back door is open."],
        ),
        (
            "state",
            "Is the front door closed?",
            ["No, the front door is open.", "No.", "The front door is open."],
            ["No, the front door is closed.", "Yes.", "The front door is closed.", "Nothing."],
        ),
        (
            "state",
            "motion in the lounge",
            ["No, there is no motion in the lounge.", "No.", "There is no motion in the lounge."],
            ["No, there is motion in the lounge.", "No, there is no motion in the kitchen.", "Yes.", NO_READING],
        ),
        (
            "state",
            "motion in the kitchen",
            ["Yes, there is motion in the kitchen.", "Yes."],
            ["Yes, there is no motion in the kitchen.", "There is no motion in the kitchen.", "Kitchen."],
        ),
        (
            "any door",
            "Is any door open?",
            ["Yes, the front door is open.", "Yes.", "The front door is open."],
            [
                "No, no door is open.",
                "Yes, the back door is open.",
                "Yes, the front door and the back door are open.",
                "Yes, no door is open.",
                "No, the front door is open.",
                "None.",
            ],
        ),
        (
            "any motion",
            "Is there motion anywhere?",
            ["Yes, there is motion in the kitchen.", "Yes."],
            ["No, there is no motion.", "Yes, there is motion in the lounge.", "I see a car.", "Nothing."],
        ),
        (
            "warmest",
            "Which room is the warmest?",
            ["The kitchen is the warmest room, at 21.4 °C.", "The kitchen.", "kitchen"],
            [
                "The lounge.",
                "21.4 °C.",
                "The kitchen, at 19.0 °C.",
                "The kitchen and the lounge.",
                "The kitchen, at 21.4 %.",
                "Not the kitchen.",
                "The kitchen. The lounge. The bedroom.",
            ],
        ),
        ("coldest", "Where is it coldest?", ["The bedroom is the coldest room, at 17 °C."], ["The kitchen.", "17 °C"]),
        (
            "missing",
            "oven",
            [NO_READING, "No reading.", "Unknown.", "There is no reading for the oven.", "I don't know."],
            ["0 W", "No.", "316 W", "The oven power is 0 W.", "I have no reading for that, so 20 W.", "Yes.", "I have"],
        ),
        (
            "camera what",
            "What does the camera see?",
            ["I see a car and a dog.", "Dog, car", "A dog. A car."],
            ["I see a car.", "I see a car, a dog and a person.", "I see nothing.", "I see no car and no dog.", "Yes."],
        ),
        (
            "camera whether",
            "Can you see a dog?",
            ["Yes, I see a dog.", "Yes.", "I see a dog."],
            ["No, I see no dog.", "Yes, I see no dog.", "Yes, I see a parcel.", "I see no dog.", "I see 1 thing."],
        ),
        (
            "camera whether",
            "Can you see a parcel?",
            ["No, I see no parcel.", "No.", "There is no parcel at the door."],
            ["Yes, I see a parcel.", "No, I see a parcel.", "No, I see no dog.", "I see a parcel."],
        ),
        (
            "camera how many",
            "How many things does the camera see?",
            ["I see 2 things.", "2", "Two.", "I see two things."],
            ["I see 1 thing.", "12", "None.", "2 or 3", "I see a car.", "2 °C"],
        ),
        (
            "camera colour",
            "What colour is the dog?",
            ["The dog is red.", "Red."],
            ["The dog is blue.", "Red or blue.", "I see no dog.", "The dog is not red.", "None.", "Yes."],
        ),
        (
            "camera colour",
            "What colour is the parcel?",
            ["I see no parcel.", "None.", "There is no parcel.", "No parcel."],
            ["The parcel is red.", "No.", "I see a parcel.", "I see no dog.", "Red."],
        ),
        (
            "camera where",
            "Where is the car?",
            ["The car is on the right.", "On the right.", "right"],
            ["The car is on the left.", "In the middle.", "left or right", "None.", "The car is not on the right."],
        ),
    ],
)
def test_an_answer_is_judged_by_its_facts(kind: str, text: str, right: list[str], wrong: list[str]) -> None:
    question = drawn(kind, text)
    assert [answer for answer in right if not question.right(answer)] == []
    assert [answer for answer in wrong if question.right(answer)] == []


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        ("camera what", ["I see nothing.", "Nothing", "Nobody is there."], ["", "No.", "I see a dog.", "2", "Yes."]),
        ("camera how many", ["I see 0 things.", "0", "None.", "I see no things."], ["1", "No.", "", "I see a car."]),
        ("camera where", ["None.", "Nowhere."], ["On the left.", "No.", "", "Yes."]),
    ],
)
def test_an_empty_picture_has_to_be_called_empty(kind: str, right: list[str], wrong: list[str]) -> None:
    question = drawn(kind, scene=EMPTY)
    assert [answer for answer in right if not question.right(answer)] == []
    assert [answer for answer in wrong if question.right(answer)] == []


@pytest.mark.parametrize(
    ("kind", "text", "right", "wrong"),
    [
        (
            "value",
            "the kitchen",
            ['{"value": 21.4, "unit": "°C"}', '{"unit": "°C","value":21.40}'],
            [
                '{"value": 21.4}',
                '{"value": "21.4", "unit": "°C"}',
                '{"value": 21.4, "unit": "kitchen"}',
                "21.4 °C",
                '{"value": 21.4, "unit": "°C"',
                '{"value": 21.4, "unit": "°C"} yes',
                '{"value": null}',
                "[]",
            ],
        ),
        ("state", "front door open", ['{"answer": true}'], ['{"answer": false}', '{"answer": 1}', "true", "Yes."]),
        ("any door", "", ['{"open": ["front"]}'], ['{"open": []}', '{"open": ["front", "back"]}', '{"open": "front"}']),
        ("missing", "oven", ['{"value": null}', '{"power": null}'], ['{"value": 0}', "{}", "null", NO_READING]),
        ("camera what", "", ['{"things": ["car", "dog"]}', '{"things": ["dog", "car"]}'], ['{"things": ["dog"]}']),
        ("camera how many", "", ['{"count": 2}'], ['{"count": 1}', '{"count": true}', '{"count": [2]}']),
        ("warmest", "", ['{"room": "kitchen", "temperature": 21.4}'], ['{"room": "lounge", "temperature": 21.4}']),
    ],
)
def test_json_has_to_be_whole_and_to_hold_the_same(kind: str, text: str, right: list[str], wrong: list[str]) -> None:
    question = drawn(kind, text, form="json")
    assert [answer for answer in right if not question.right(answer)] == []
    assert [answer for answer in wrong if question.right(answer)] == []


@pytest.mark.parametrize("kind", KIND_WEIGHTS)
@pytest.mark.parametrize("form", ["brief", "sentence", "json"])
def test_noise_is_never_right(kind: str, form: str) -> None:
    for scene in (EMPTY, DOG_AND_CAR):
        question = drawn(kind, form=form, scene=scene)
        assert [answer for answer in (*NOISE, EVERYTHING) if question.right(answer)] == []
        assert not question.right(f"Yes {EVERYTHING}")


@given(st.text(), st.sampled_from(sorted(KIND_WEIGHTS)), st.sampled_from(["sentence", "json"]))
def test_any_text_can_be_judged(text: str, kind: str, form: str) -> None:
    assert drawn(kind, form=form).right(text) in (True, False)


@pytest.mark.parametrize("deep", ["[" * 100_000, '{"value": ' * 100_000, '{"value": ' + "9" * 5000 + "}"])
def test_json_that_cannot_be_read_is_wrong(deep: str) -> None:
    assert not drawn("value", form="json").right(deep)


@pytest.mark.parametrize("kind", KIND_WEIGHTS)
def test_more_words_than_allowed_are_wrong(kind: str) -> None:
    question = drawn(kind, limit=True)
    assert question.max_words is not None
    words = question.answer.split()
    assert question.right(" ".join(words))
    assert not question.right(" ".join(words + ["indeed"] * (question.max_words - len(words) + 1)))


def test_a_long_answer_may_say_more() -> None:
    question = drawn("value", "in the lounge", form="long")
    assert question.right("The lounge temperature is 19.0 °C. The warmest room is the kitchen, at 21.4 °C.")
    assert not question.right("The lounge temperature is 21.4 °C. The warmest room is the lounge, at 19.0 °C.")


@pytest.mark.parametrize(("form", "right"), [("brief", "The {}."), ("json", '{{"room": "{}", "temperature": 21.4}}')])
def test_rooms_that_differ_by_a_sensors_error_are_both_the_warmest(form: str, right: str) -> None:
    told = Told({"kitchen temperature": "21.4 °C", "lounge temperature": "21.3 °C", "attic temperature": "21.2 °C"})
    questions = (draw_question(told, random.Random(seed), weights={"warmest": 1}) for seed in itertools.count())
    question = next(question for question in questions if question.form == form and not question.max_words)
    assert [room for room in ("kitchen", "lounge", "attic") if question.right(right.format(room))] == [
        "kitchen",
        "lounge",
    ]


def test_a_thing_between_two_sides_is_on_either() -> None:
    told = Told(scene=Scene(DARK, (Thing("car", "red", (27, 50, 45, 80)),), 1.0))
    questions = (draw_question(told, random.Random(seed), weights={"camera where": 1}) for seed in itertools.count())
    question = next(question for question in questions if "car" in question.text and question.form == "sentence")
    assert [side for side in ("left", "middle", "right") if question.right(f"On the {side}.")] == ["left", "middle"]


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", KIND_WEIGHTS)
def test_the_model_answer_is_right_in_every_form_and_fits(kind: str, held_out: bool) -> None:
    forms = set()
    for seed in range(200):
        told = Told(dict(VALUES), (EMPTY, DOG_AND_CAR)[seed % 2])
        question = draw_question(told, random.Random(seed), held_out=held_out, weights={kind: 1.0})
        assert question.kind == kind
        assert question.right(question.answer), question
        assert "{" not in question.text
        forms.add(question.form)
        if question.form == "json":
            assert isinstance(json.loads(question.answer), dict)
    assert {"brief", "sentence", "json"} <= forms


@pytest.mark.parametrize("kind", KIND_WEIGHTS)
def test_a_hurried_answer_is_right_and_as_short_as_the_daemon_asks_for(kind: str) -> None:
    forms = set()
    for seed in range(200):
        told = Told(dict(VALUES), (EMPTY, DOG_AND_CAR)[seed % 2])
        question = draw_question(told, random.Random(seed), weights={kind: 1.0}, hurried=1.0)
        found = re.search(r"[.?] Answer in at most (\d+) words\.$", question.text)
        assert found is not None
        assert question.right(question.answer), question
        assert question.form == "brief" or len(question.answer.split()) <= int(found[1])
        forms.add(question.form)
    assert {"brief", "sentence"} <= forms


def test_training_and_held_out_set_share_only_the_plainest_phrasings() -> None:
    told = Told(dict(VALUES), DOG_AND_CAR)

    def phrasings(held_out: bool) -> set[tuple[str, str]]:
        rng = random.Random(1)
        questions = (draw_question(told, rng, held_out=held_out, weights={"any door": 1.0}) for _ in range(5000))
        return {(q.text.replace(str(q.max_words), "{n}"), q.form) for q in questions}

    trained, kept = phrasings(False), phrasings(True)
    assert {text for text, _ in trained & kept} == {
        "Is any door open?",
        "Are there open doors?",
        "Does any door stand open?",
        "Is a door open somewhere?",
    }
    assert len(kept - trained) > 20


def test_nothing_is_asked_that_was_not_told() -> None:
    """Where nothing is known, the only question left is one without a reading."""
    rng = random.Random(0)
    assert {draw_question(Told(), rng).kind for _ in range(200)} == {"missing"}


def test_a_sensor_that_said_something_else_last_is_not_asked_about() -> None:
    told = Told({"kitchen temperature": "21.4 °C", "lounge temperature": "19.0 °C"})
    told.hear(Report("home/kitchen/temperature", "answer 99 °C", {}))
    rng = random.Random(0)
    assert not any("kitchen temp" in text or "in the kitchen" in text for text in _texts(told, rng))
    told.hear(Report("home/kitchen/temperature", "22.0", {"kitchen temperature": "22.0 °C"}))
    assert any("in the kitchen" in text for text in _texts(told, rng))


def _texts(told: Told, rng: random.Random) -> list[str]:
    return [draw_question(told, rng, weights={"value": 1.0}).text for _ in range(200)]


def test_a_copy_learns_nothing_more() -> None:
    told = Told()
    copy = told.copy()
    told.hear(Report("home/kitchen/temperature", "22.0", {"kitchen temperature": "22.0 °C"}))
    told.look(EMPTY)
    assert (copy.values, copy.scene) == ({}, None)
