"""The measurement of budgets draws what it says, counts rightly, and reaches a real daemon."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from broker import until
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from patience import PATIENCE_S

from iotd.cli import budget_table, commands
from iotd.convert.convert import convert_checkpoint, convert_random
from iotd.demo import bench_budget
from iotd.demo.arrivals import (
    BUDGETS_S,
    KINDS,
    Arrival,
    Kind,
    arrivals,
    budgets_for,
    kinds,
    mean_service_s,
)
from iotd.demo.bench_budget import BudgetBench, Settings
from iotd.demo.broker import Mosquitto
from iotd.demo.budget_asks import judge
from iotd.demo.budget_score import (
    Again,
    Asked,
    LoadScore,
    Share,
    alone,
    ends_with_sentence,
    has_sentence,
    score,
    spread,
)
from iotd.demo.home_process import HomeProcess
from iotd.demo.judge import Fact
from iotd.demo.package import CHECKPOINT
from iotd.demo.questions import FORMS, KIND_WEIGHTS, Question
from iotd.errors import InvalidInput, PackageError, Unavailable
from iotd.events import CostStatus, FinishReason, Plan, Timings, Usage

pytest_plugins = ("broker",)

BUDGETS = (0.1, 6.4)
FAST = ["--threads", "1", "--rate", "40", "--frames", "4"]
"""So that every device has soon spoken."""
BUSY_S = st.floats(1e-4, 1e3)


def drawn(seed: int, n: int, *, rate_hz: float = 10.0, again: float = 0.0) -> list[Arrival]:
    return list(islice(arrivals(random.Random(seed), rate_hz, BUDGETS, KINDS, again=again), n))


def answered(budget_s: float = 1.0, end_s: float = 0.5, **fields: object) -> Asked:
    """An ask that was accepted, sent at once when it was due."""
    asked = Asked("sentence", "free", "?", budget_s, 16, 0.0, accepted_s=0.001, end_s=end_s)
    asked.finish_reason = FinishReason.STOP
    return replace(asked, **fields)  # type: ignore[arg-type]


def refused(again: Again | None = None, **fields: object) -> Asked:
    asked = answered(end_s=0.002, error="RESOURCE_EXHAUSTED", accepted_s=None, finish_reason=None, again=again)
    return replace(asked, **fields)  # type: ignore[arg-type]


def cut_off(text: str, end_s: float = 0.9, **fields: object) -> Asked:
    return answered(end_s=end_s, text=text, **fields | {"finish_reason": FinishReason.BUDGET})


def scored(asked: list[Asked], **options: object) -> LoadScore:
    known: dict[str, object] = {"load": 0.5, "rate_hz": 2.0, "step_s": 0.1, "budgets_s": BUDGETS, "costs": CostStatus()}
    return score(asked, **known | options)  # type: ignore[arg-type]


def test_asks_arrive_at_random_and_the_same_seed_draws_the_same() -> None:
    asks = drawn(1, 4000)
    assert asks == drawn(1, 4000)
    gaps = [b.at_s - a.at_s for a, b in pairwise(asks)]
    mean_s = sum(gaps) / len(gaps)
    assert mean_s == pytest.approx(0.1, rel=0.06)
    # As long as the mean is the standard deviation of what is exponential.
    assert math.sqrt(sum((gap - mean_s) ** 2 for gap in gaps) / len(gaps)) == pytest.approx(mean_s, rel=0.08)


def test_budgets_are_as_likely_in_each_octave() -> None:
    budgets = [ask.budget_s for ask in drawn(2, 6000)]
    assert BUDGETS[0] <= min(budgets)
    assert max(budgets) <= BUDGETS[1]
    octaves = [sum(0.1 * 2**n <= budget < 0.1 * 2 ** (n + 1) for budget in budgets) for n in range(6)]
    assert octaves == [pytest.approx(1000, rel=0.12)] * 6


def test_kinds_are_drawn_by_weight_and_within_their_lengths() -> None:
    asks = drawn(3, 4000)
    total = sum(kind.weight for kind in KINDS)
    for kind in KINDS:
        own = [ask for ask in asks if ask.kind is kind]
        assert len(own) / len(asks) == pytest.approx(kind.weight / total, abs=0.03)
        shortest, longest = kind.max_tokens
        assert all(shortest <= ask.max_tokens <= longest for ask in own)
        assert len({ask.max_tokens for ask in own}) > (longest - shortest) / 2


def test_who_asks_again_asks_the_same() -> None:
    never, now_and_then = drawn(4, 500), drawn(4, 500, again=0.3)
    assert [replace(ask, again=False) for ask in now_and_then] == never
    assert sum(ask.again for ask in now_and_then) == pytest.approx(150, abs=40)


def test_a_package_is_asked_what_it_can_answer() -> None:
    assert kinds(vision=True, thinking=True) == KINDS
    names = [kind.name for kind in kinds(vision=False, thinking=False)]
    assert names == ["short", "sentence", "long", "choices", "schema", "regex"]
    assert {kind.name: kind.form for kind in KINDS if kind.form != "free"} == {
        "choices": "choices",
        "schema": "json_schema",
        "regex": "regex",
    }
    for kind in KINDS:
        assert {*kind.subjects} <= {*KIND_WEIGHTS}
        assert {*kind.forms} <= {*FORMS}


def test_budgets_suit_the_speed_of_the_model() -> None:
    assert budgets_for(0.002) == pytest.approx((0.01, 1.0))
    assert budgets_for(0.03) == BUDGETS_S


@given(BUSY_S, BUSY_S, BUSY_S)
def test_the_mean_of_what_a_budget_cuts_off_is_that_of_many_budgets(took_s: float, a: float, b: float) -> None:
    low, high = sorted((a, b))
    if high < 1.001 * low:
        return
    steps = 2000
    budgets = [low * (high / low) ** ((n + 0.5) / steps) for n in range(steps)]
    expected = sum(min(took_s, budget) for budget in budgets) / steps
    assert mean_service_s({KINDS[0]: [took_s]}, (low, high)) == pytest.approx(expected, rel=1e-3)


def test_the_mean_of_the_mix_goes_by_weight() -> None:
    rare, often = (Kind("", weight, (), (), "", (1, 1)) for weight in (1.0, 3.0))
    assert mean_service_s({rare: [1.0, 3.0], often: [0.4]}, (50.0, 100.0)) == pytest.approx(0.25 * 2.0 + 0.75 * 0.4)


def test_percentiles_were_measured() -> None:
    found = spread([float(n) for n in range(200, 0, -1)])
    assert found is not None
    assert (found.n, found.mean, found.p50, found.p95, found.p99, found.most) == (200, 100.5, 100, 190, 198, 200)
    assert spread([None]) is None
    one = spread([None, 3.0])
    assert one is not None
    assert {one.mean, one.p50, one.p99, one.most} == {3.0}


@pytest.mark.parametrize(
    ("text", "contains", "ends"),
    [
        ("It is warm.", True, True),
        ("It is warm. The kit", True, False),
        ("It is 21.", False, False),
        ("It is 21. And", False, False),
        ("Is it 21?", True, True),
        ('He said "no." ', True, True),
        ("one line\n", True, True),
        ("21.4 °C", False, False),
        ("iotd.v1", False, False),
        ("家は暖かい。", True, True),
        ("It is warm and…", False, False),
        ("It is warm. And...", True, False),
        ("", False, False),
    ],
)
def test_a_sentence_has_an_end(text: str, contains: bool, ends: bool) -> None:
    assert (has_sentence(text), ends_with_sentence(text)) == (contains, ends)


def test_in_time_is_what_came_whole_before_the_budget_ended() -> None:
    late, failed = answered(end_s=1.25), answered(end_s=0.7, error="DEADLINE_EXCEEDED")
    found = scored([answered(), answered(end_s=1.0), late, failed, refused()])
    assert (found.asks, found.accepted) == (5, 4)
    assert found.in_time == Share(2, 4)
    assert found.refused == Share(1, 5)
    assert found.errors == {"DEADLINE_EXCEEDED": 1}
    assert found.late_s is not None
    assert found.late_s.most == pytest.approx(0.25)
    assert found.late_steps is not None
    assert (found.late_steps.p50, found.late_steps.most) == (0.0, pytest.approx(2.5))
    assert found.refused_s is not None
    assert found.refused_s.p99 == pytest.approx(0.002)


def test_another_error_is_no_refusal() -> None:
    found = scored([refused(error="NOT_FOUND")])
    assert (found.refused, found.errors, found.in_time) == (Share(0, 1), {"NOT_FOUND": 1}, Share(0, 0))


def test_only_answers_cut_off_say_how_much_of_a_budget_is_used_and_how_they_end() -> None:
    found = scored([answered(text="No"), cut_off("It is", 0.8), cut_off("Yes.", 0.9), cut_off("It is …", 1.0)])
    assert found.used is not None
    assert (found.used.n, found.used.p50) == (3, 0.9)
    assert found.whole_sentences == Share(1, 3)
    assert found.broken_off == Share(1, 3)
    assert found.whole_answers == Share(2, 4)
    formed = cut_off("{}", form="json_schema", valid=True)
    assert scored([formed]).whole_sentences == Share(0, 0)
    assert scored([formed, answered(form="regex", valid=False)]).valid == Share(1, 2)


def test_an_ask_is_alone_while_no_other_is_on() -> None:
    """One that was refused keeps the engine busy only where it is sent again."""
    first, second = answered(end_s=0.5), answered(due_s=0.4, end_s=0.2)
    third, fourth = answered(due_s=0.7, end_s=0.1), answered(due_s=1.0, end_s=3.0)
    assert alone([fourth, third, second, first]) == [third, fourth]
    assert alone([first, refused(due_s=0.1)]) == [first]
    assert alone([first, refused(Again(), due_s=0.1), fourth]) == []


def test_what_was_refused_wrongly_had_a_use_in_time() -> None:
    tried = [Again(), Again(pieces=3), Again(pieces=4), Again(pieces=2, sentence=True), Again(1, False, True)]
    assert [again.useful("free") for again in tried] == [False, False, True, True, True]
    assert [again.useful("regex") for again in tried] == [False, False, False, False, True]
    assert scored([*map(refused, tried), refused(), answered()]).refused_wrongly == Share(3, 5)


def test_a_plan_is_held_to_its_time_where_it_came_true() -> None:
    plan = Plan(answer_tokens=8, thinking_tokens=2, predicted=Timings(total_s=0.6))
    told = {"plan": plan, "timings": Timings(total_s=0.5)}
    as_planned, shorter = (answered(usage=Usage(generation_tokens=n), **told) for n in (10, 9))
    unplanned = answered(usage=Usage(), plan=Plan(), timings=Timings(total_s=0.5))
    found = scored([as_planned, shorter, unplanned, refused()]).predicted_error
    assert found is not None
    assert (found.n, found.most) == (1, pytest.approx(0.2))


def test_right_is_right_in_time_of_all_that_were_asked() -> None:
    accepted = [answered(right=True), answered(right=True, end_s=1.1), answered(right=False), answered()]
    found = scored([*accepted, refused(right=False)], cut=[answered(right=True)])
    assert (found.right, found.right_of_accepted, found.right_cut) == (Share(1, 4), Share(1, 3), Share(1, 1))


def test_a_hog_divides_a_load_in_three() -> None:
    asked = [answered(due_s=1.0), answered(due_s=2.0, end_s=2.0), answered(due_s=3.9), answered(due_s=4.0)]
    assert scored(asked, hog_s=(2.0, 4.0)).thirds == {
        "before": Share(1, 1),
        "during": Share(1, 2),
        "after": Share(1, 1),
    }
    assert scored(asked).thirds == {}


def test_every_ask_is_in_one_bin() -> None:
    asked = [answered(budget_s) for budget_s in (0.1, *(0.15 * 2**n for n in range(6)))] + [refused(budget_s=0.3)]
    bins = scored(asked).bins
    assert [(round(found.low_s, 3), round(found.high_s, 3)) for found in bins] == [
        (round(0.1 * 2**n, 3), round(0.2 * 2**n, 3)) for n in range(6)
    ]
    assert [found.refused for found in bins] == [Share(0, 2), Share(1, 2), *[Share(0, 1)] * 4]
    assert sum(found.in_time.of for found in bins) == 7
    assert [found.low_s for found in scored([answered(budget_s=6.4)]).bins] == [pytest.approx(3.2)]


TRUTH = Question("state", "Is the front door open?", "Yes.", Fact(yes=True), "brief")


@pytest.mark.parametrize(
    ("form", "text", "valid"),
    [
        ("choices", "Yes", True),
        ("choices", "Ye", False),
        ("json_schema", '{"room": "kitchen", "degrees": 21, "note": "warm"}', True),
        ("json_schema", '{"room": "moon", "degrees": 21, "note": ""}', False),
        ("json_schema", '{"room": "kitchen", "degrees": 21.5, "note": ""}', False),
        ("json_schema", '{"room": "kit', False),
        ("regex", "The house is warm, 21.", True),
        ("regex", "The house is warm, 21. And", False),
        ("free", "anything", None),
    ],
)
def test_answers_are_valid_by_somebody_elses_word(form: str, text: str, valid: bool | None) -> None:
    assert judge(answered(form=form, text=text), None).valid is valid
    assert judge(answered(form=form, text=text, error="INTERNAL"), None).valid is None


def test_an_answer_is_judged_by_the_truth() -> None:
    assert judge(answered(text="Yes."), TRUTH).right is True
    assert judge(answered(text="No."), TRUTH).right is False
    assert judge(refused(), TRUTH).right is False
    assert judge(answered(text="Yes."), None).right is None


def test_the_table_and_the_plot_tell_what_was_found() -> None:
    asked = [answered(0.15, right=True, end_s=0.1), answered(3.3, right=False), cut_off("Yes.", budget_s=1.0)]
    found = scored([*asked, refused()], cut=[answered(0.15, right=False)], hog_s=(1.0, 2.0))
    lines = [*budget_table.table(found)]
    assert lines[0] == "load 0.5: 4 asks, 2 a second"
    assert any(line.split()[:6] == ["in", "time", "100.0%", "(3", "of", "3;"] for line in lines)
    assert [line.split()[:4] for line in lines[-3:]] == [
        ["100", "ms", "to", "200"],
        ["800", "ms", "to", "1.6"],
        ["3.2", "s", "to", "6.4"],
    ]
    assert next(budget_table.table(scored([]))) == "load 0.5: 0 asks, 2 a second"
    drawn = {(figure.engine, figure.at): figure.median for figure in budget_table.figures(found)}
    assert drawn["right", 141] == 1.0
    assert drawn["right if cut at 16", 141] == 0.0
    assert drawn["whole sentences", 1131] == 1.0
    assert ("whole sentences", 141) not in drawn


@pytest.mark.parametrize("camera", [True, False])
def test_a_home_in_its_own_process_draws_questions(camera: bool, mosquitto: Mosquitto) -> None:
    with HomeProcess(mosquitto.host, mosquitto.port, seed=1, rate_hz=200, frame_hz=20.0 * camera, speed=1.0) as home:
        ends_s = time.monotonic() + 20
        while not (found := home.question(3, ["missing"], ["long"])):
            assert time.monotonic() < ends_s, "nothing was settled"
            time.sleep(0.05)
        assert (found.kind, found.form) == ("missing", "sentence")
        assert found.right(found.answer)


def test_a_home_without_a_broker_is_said_to_have_ended(mosquitto: Mosquitto) -> None:
    mosquitto.stop()
    home = HomeProcess(mosquitto.host, mosquitto.port, seed=1, rate_hz=200, frame_hz=0.0, speed=1.0)
    with home, pytest.raises(Unavailable, match=str(mosquitto.port)):
        for _ in range(200):
            home.question(3, ["missing"], FORMS)
            time.sleep(0.05)


def test_what_cannot_be_measured_is_said_at_once(
    tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PackageError, match="not a model package"):
        BudgetBench(tmp_path, Settings())
    monkeypatch.setattr(bench_budget, "HOG", ("no-such-hog",))
    with pytest.raises(InvalidInput, match="no-such-hog is not installed"):
        BudgetBench(tiny_package, Settings(hog=True))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--budgets", "10s:1s"], "write the shortest budget before the longest"),
        (["--budgets", "10s"], "is no duration"),
        (["--load", "0"], "0"),
    ],
)
def test_wrong_usage_is_told(args: list[str], said: str) -> None:
    result = CliRunner().invoke(commands, ["bench", "budget", "/no", *args])
    assert result.exit_code == 2
    assert said in result.stderr


@pytest.fixture(scope="module")
def demo_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages") / "demo"
    convert_checkpoint(CHECKPOINT, folder)
    return folder


def bench(package: Path, tmp_path: Path, *args: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "iotd", "bench", "budget", str(package), *FAST, *args],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_daemon_is_asked_over_grpc_while_it_reads_the_home(demo_package: Path, tmp_path: Path) -> None:
    answers, plot, own = tmp_path / "answers.jsonl", tmp_path / "out.svg", tmp_path / "tmp"
    own.mkdir()
    options = ["--load", "0.5", "--load", "1.5", "--asks", "20", "--budgets", "1s:30s", "--baseline", "--json"]
    process = bench(demo_package, own, *options, "--answers", str(answers), "--plot", str(plot))
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (0, "")
    loads = [json.loads(line) for line in output.splitlines()]
    asked = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["load"] for line in loads] == [0.5, 1.5]
    assert [line["asks"] for line in loads] == [20, 20]
    assert len(asked) == 40
    assert loads[0]["vision"] is loads[0]["judged"] is True
    assert loads[1]["rate_hz"] == pytest.approx(3 * loads[0]["rate_hz"])
    for line in loads:
        own_asks = [ask for ask in asked if ask["load"] == line["load"]]
        assert line["accepted"] == sum(ask["accepted_s"] is not None for ask in own_asks) > 0
        assert line["lag_s"]["n"] == 20
        assert line["valid"]["n"] == line["valid"]["of"]
        assert line["right"]["n"] + line["right_cut"]["n"] > 0
    ended = [ask for ask in asked if not ask["error"]]
    assert ended
    for ask in ended:
        assert 0 < ask["accepted_s"] <= ask["end_s"]
        assert ask["timings"]["total_s"] <= ask["end_s"]
    drawn_texts = [
        text.text for text in ElementTree.fromstring(plot.read_text()).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert "load 0.5, share" in drawn_texts
    assert "budget, ms" in drawn_texts


def test_a_model_that_sees_nothing_and_says_anything_is_measured_and_shown(tmp_path: Path) -> None:
    package, own = tmp_path / "blind", tmp_path / "tmp"
    convert_random("tiny", package, recipe="fp32", vision=False)
    own.mkdir()
    process = bench(package, own, "--load", "0.5", "--asks", "10", "--budgets", "50ms:1s")
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (0, "")
    assert "without vision" in output
    assert "load 0.5: 10 asks" in output
    assert "right and in time" not in output
    assert "\x1b" not in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_measurement_leaves_nothing_behind(
    demo_package: Path, tmp_path: Path, number: signal.Signals
) -> None:
    own = tmp_path / "tmp"
    own.mkdir()
    process = bench(demo_package, own, "--load", "0.1", "--asks", "5000")
    assert process.stdout is not None
    assert any("budgets from" in line for line in process.stdout)
    below = children(process.pid)
    assert len(below) >= 3
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors.strip()) == (130, "")
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))
    assert list(own.iterdir()) == []


def children(pid: int) -> list[int]:
    """Of the process, and theirs."""
    found = [
        int(child) for tasks in Path(f"/proc/{pid}/task").glob("*/children") for child in tasks.read_text().split()
    ]
    return [*found, *(below for child in found for below in children(child))]
