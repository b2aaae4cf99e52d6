"""The evaluation asks the same questions of whoever is asked, counts rightly, and reaches a real daemon."""

import json
import math
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from daemon import serving
from patience import PATIENCE_S

from iotd.cli import commands
from iotd.client import Client
from iotd.config import DEFAULT_SYSTEM, AskConfig
from iotd.convert.convert import convert_random
from iotd.demo import respondents
from iotd.demo.broker import Mosquitto
from iotd.demo.calibration import Case, calibration, expected_error
from iotd.demo.devices import home_subscriptions
from iotd.demo.evaluate import HOME_EVENTS, Score, ask, by_kind, home, score
from iotd.demo.examples import HELD_OUT_SEED, Asked, Heard, Seen
from iotd.demo.respondents import DaemonRespondent, PackageRespondent
from iotd.engine.lines import day_line, day_of, frame_line, reading_line
from iotd.errors import InvalidInput, IotdError, Unavailable
from iotd.events import Reading
from iotd.model import Model
from iotd.rpc.request import parse
from iotd.v1 import iotd_pb2

pytest_plugins = ("broker",)


class Scripted:
    """Answers every question alike, or by heart where no answer is given; keeps what it has read of each home."""

    def __init__(self, answer: str | None = None) -> None:
        self.homes: list[list[Heard | Seen]] = []
        self.seeds: list[int | None] = []
        self._answer = answer
        self._by_heart: deque[str] = deque()

    def begin(self) -> None:
        events = home(HELD_OUT_SEED + len(self.homes))
        self._by_heart.extend(event.question.answer for event in events if isinstance(event, Asked))
        self.homes.append([])

    def read(self, event: Heard | Seen) -> None:
        self.homes[-1].append(event)

    def answer(self, question: str, seed: int | None = None) -> str:
        self.seeds.append(seed)
        if self._answer is not None:
            return self._answer
        return self._by_heart[0] if seed is None else self._by_heart.popleft()

    def weigh(self, question: str, labels: Sequence[str]) -> list[float]:
        return [-1.0, -2.0]


def iotd(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "iotd", "eval", *args], check=False, capture_output=True, text=True, timeout=PATIENCE_S
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_who_knows_all_answers_gets_them_all_right() -> None:
    outcomes = list(ask(Scripted(), 300))
    assert score(outcomes) == score(outcomes, drawn=True) == Score(300, 300)
    assert sum(len(each) for each in by_kind(outcomes).values()) == 300
    assert all({kind} == {outcome.kind for outcome in each} for kind, each in by_kind(outcomes).items())


def test_each_question_is_answered_greedily_and_with_a_seed_of_its_own() -> None:
    """The same seeds in every run, and nothing that is drawn counts as greedy."""
    one, other = Scripted("No."), Scripted("Yes.")
    for respondent in (one, other):
        list(ask(respondent, 40))
    assert one.seeds == other.seeds
    assert {None} == {*one.seeds[::2]}
    assert len({*one.seeds[1::2]} - {None}) == 40


def test_what_is_drawn_is_what_a_daemon_draws_by_default(tiny_package: Path) -> None:
    """The same for the same seed, and another for others, where the model is in doubt."""
    with PackageRespondent(tiny_package, threads=1) as respondent:
        respondent.begin()
        drawn = [respondent.answer("Is any door open?", seed) for seed in (1, 1, 2)]
        messages = [{"role": "system", "content": DEFAULT_SYSTEM}, {"role": "user", "content": "Is any door open?"}]
        sampling = parse(iotd_pb2.AskRequest(question="?"), 0.0, 1.0, AskConfig()).sampling
        options = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "presence_penalty")}
        model = Model.open(tiny_package, threads=1)
        expected = "".join(model.generate(messages, max_tokens=respondents.MAX_TOKENS, seed=1, **options))
    assert drawn[0] == drawn[1] == expected != drawn[2]


def test_the_same_questions_are_asked_of_everybody() -> None:
    one, other = ([(o.home, o.index, o.question) for o in ask(Scripted(answer), 60)] for answer in ("No.", "Yes."))
    assert one == other
    assert len(set(one)) == 60
    assert [o.index for o in ask(Scripted(), 60) if o.home == HELD_OUT_SEED] == [
        *range(Counter(h for h, *_ in one)[HELD_OUT_SEED])
    ]


def test_one_answer_to_everything_is_right_no_more_often_than_it_is_true() -> None:
    found = by_kind(list(ask(Scripted("No."), 600)))
    true = {kind for kind, each in found.items() if score(each).right}
    assert true == {"state", "any door", "any motion", "camera whether"}
    assert score(ask(Scripted(""), 300)).right == 0


def test_a_home_is_short_and_ends_with_a_question() -> None:
    for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + 20):
        events = list(home(seed))
        assert isinstance(events[-1], Asked)
        assert sum(not isinstance(event, Asked) for event in events) <= HOME_EVENTS


def test_what_comes_after_mischief_is_marked() -> None:
    respondent = Scripted()
    outcomes = list(ask(respondent, 400))
    heard = {
        HELD_OUT_SEED + i
        for i, events in enumerate(respondent.homes)
        if any(isinstance(event, Heard) and not event.report.says for event in events)
    }
    assert heard
    assert {outcome.home for outcome in outcomes if outcome.mischief} <= heard
    for seed in heard:
        marks = [outcome.mischief for outcome in outcomes if outcome.home == seed]
        assert marks == sorted(marks)


def test_one_home_can_go_on_for_all_questions() -> None:
    respondent = Scripted("No.")
    outcomes = list(ask(respondent, 100, one_home=True))
    assert [(outcome.home, outcome.index) for outcome in outcomes] == [(HELD_OUT_SEED, i) for i in range(100)]
    assert len(respondent.homes[0]) > HOME_EVENTS


@pytest.mark.parametrize(
    ("right", "asked", "interval"),
    [  # the first two from R. G. Newcombe, Statistics in Medicine 17 (1998), table I
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (29, 29, (0.8830, 1.0)),
    ],
)
def test_the_interval_is_wilsons(right: int, asked: int, interval: tuple[float, float]) -> None:
    assert Score(asked, right).interval == pytest.approx(interval, abs=1e-4)


def test_nothing_asked_is_no_accuracy() -> None:
    assert (Score(0, 0).accuracy, Score(0, 0).interval) == (0.0, (0.0, 1.0))
    assert by_kind([]) == {}


def test_yes_and_no_are_weighed_where_the_answer_begins_with_one_of_them() -> None:
    outcomes = list(ask(Scripted(), 400))
    weighed = [outcome for outcome in outcomes if outcome.yes_no is not None]
    assert {outcome.expected.split()[0].strip(".,") for outcome in weighed} == {"Yes", "No"}
    assert {outcome.kind for outcome in weighed} == {"state", "any door", "any motion", "camera whether"}
    for outcome in weighed:
        assert outcome.case == Case(1.0, right=outcome.expected.startswith("Yes"))
    assert all(outcome.case is None for outcome in outcomes if outcome.yes_no is None)


def margin(confidence: float) -> float:
    return math.log(confidence / (1 - confidence))


def test_the_calibration_error_is_the_mean_difference_of_confidence_and_accuracy() -> None:
    """Worked by hand: bins of 0.5 to 0.6, of 0.7 to 0.8 and of 0.9 to 1."""
    cases = [Case(margin(0.55), True), Case(margin(0.75), False), Case(margin(0.71), True), Case(margin(0.95), True)]
    bins = 1 * abs(1 - 0.55) + 2 * abs(0.5 - 0.73) + 1 * abs(1 - 0.95)
    assert expected_error(cases, 1.0) == pytest.approx(bins / 4)
    assert expected_error([Case(1e6, True)], 1.0) == 0
    assert expected_error([Case(0.0, True), Case(0.0, False)], 1.0) == 0


def test_the_temperature_undoes_what_a_model_is_too_sure_of() -> None:
    """It is twice as sure as it should be: of ten answers with 80 % two are wrong, and it says 94 %."""
    cases = [Case(2 * margin(0.8), right=n // 2 % 5 > 0) for n in range(200)]
    found = calibration(cases)
    assert found is not None
    assert (found.asked, found.right) == (200, 160)
    assert found.temperature == pytest.approx(2.0, rel=0.04)
    assert found.error == pytest.approx(16 / 17 - 0.8)
    assert found.rest_error == pytest.approx(found.error)
    assert found.rest_error_at_temperature < 0.01
    assert calibration(cases[:1]) is None


def test_yes_and_no_weigh_what_the_model_says(tiny_package: Path) -> None:
    model, question, labels = Model.open(tiny_package, threads=1), "Is any door open?", ["Y", "Not"]
    heard = [event for event in islice(home(HELD_OUT_SEED), 8) if isinstance(event, Heard)]
    with PackageRespondent(tiny_package, threads=1) as respondent:
        respondent.begin()
        for event in heard:
            respondent.read(event)
        found = respondent.weigh(question, labels)
    content = [part for n, event in enumerate(heard) for part in written(event, first=n == 0)]
    user = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
    (prompt,) = model._parts([{"role": "system", "content": DEFAULT_SYSTEM}, user], thinking=False)
    expected = []
    for label in labels:
        total, ids = 0.0, list(prompt)
        for token in model.tokenizer.encode(label):
            logits = model.prefill(model.new_state(2048), ids).astype(float)
            total += logits[token] - math.log(sum(map(math.exp, logits)))
            ids.append(token)
        expected.append(total)
    assert found == pytest.approx(expected, abs=1e-3)


def test_a_random_model_is_never_right(tiny_package: Path) -> None:
    with PackageRespondent(tiny_package, threads=1) as respondent:
        outcomes = list(ask(respondent, 12))
    assert score(outcomes) == Score(12, 0)
    assert all(outcome.answer for outcome in outcomes)


def test_the_answer_is_that_of_the_prompt_given_whole(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(respondents, "MAX_TOKENS", 12)
    model = Model.open(tiny_package, threads=1)
    content: list[dict[str, Any]] = []
    n_pictures = 0
    with PackageRespondent(tiny_package, threads=1) as respondent:
        respondent.begin()
        for event in islice(home(HELD_OUT_SEED), 25):
            if isinstance(event, Asked):
                messages = [
                    {"role": "system", "content": DEFAULT_SYSTEM},
                    {"role": "user", "content": [*content, {"type": "text", "text": event.question.text}]},
                ]
                whole = "".join(model.generate(messages, max_tokens=12, temperature=0, presence_penalty=0))
                assert respondent.answer(event.question.text) == respondent.answer(event.question.text) == whole
            else:
                respondent.read(event)
                content += written(event, first=not content)
                n_pictures += isinstance(event, Seen)
    assert n_pictures


def written(event: Heard | Seen, *, first: bool) -> list[dict[str, Any]]:
    """The event in the words of the daemon, as parts of a message."""
    observation = event.observation()
    date = [{"type": "text", "text": day_line(day_of(event.time_s))}] if first else []
    if isinstance(observation, Reading):
        return [*date, {"type": "text", "text": reading_line(observation)}]
    before = {"type": "text", "text": frame_line(observation.camera, observation.time_s)}
    return [*date, before, {"type": "image", "image": observation.rgb}, {"type": "text", "text": "\n"}]


def test_a_running_daemon_is_asked_through_broker_and_grpc(
    tiny_package: Path, tmp_path: Path, mosquitto: Mosquitto
) -> None:
    config = {
        "model": {"path": str(tiny_package), "threads": 1},
        "mqtt": {
            "host": "127.0.0.1",
            "port": mosquitto.port,
            "subscriptions": msgspec.to_builtins(home_subscriptions()),
        },
    }
    answers = tmp_path / "answers.jsonl"
    with serving(tmp_path, config) as daemon:
        target = daemon.wait_ready().target
        broker = f"127.0.0.1:{mosquitto.port}"
        result = iotd("--target", target, "--broker", broker, "--questions", "6", "--answers", str(answers), "--json")
        assert (result.returncode, result.stderr) == (0, "")
        with DaemonRespondent(target, broker) as respondent, Client(target) as client:
            before = client.status().engine
            events = [event for event in islice(home(HELD_OUT_SEED), 12) if not isinstance(event, Asked)]
            for event in events:
                respondent.read(event)
            after = client.status().engine
    assert json.loads(result.stdout)["overall"]["asked"] == 6
    expected = list(ask(Scripted(), 6, one_home=True))
    assert [line["question"] for line in read_lines(answers)] == [outcome.question for outcome in expected]
    weighed = [line["yes_no"] is not None for line in read_lines(answers)]
    assert weighed == [outcome.yes_no is not None for outcome in expected]
    assert any(weighed)
    grown = {name: after.counters[name] - before.counters[name] for name in after.counters}
    assert grown["readings_read"] + grown["frames_read"] == len(events)
    assert grown["frames_read"] == sum(isinstance(event, Seen) for event in events) > 0
    assert grown["dropped_readings"] + grown["dropped_frames"] + grown["refused_frames"] == 0


def test_fresh_daemons_are_asked_what_the_package_is_asked(tiny_package: Path, tmp_path: Path) -> None:
    ways = {"direct": [], "through": ["--through-daemon"], "restarted": ["--through-daemon", "--restart-every", "4"]}
    files = [tmp_path / f"{name}.jsonl" for name in ways]
    for path, extra in zip(files, ways.values(), strict=True):
        result = iotd(str(tiny_package), "--questions", "4", "--threads", "1", "--answers", str(path), *extra)
        assert (result.returncode, result.stderr) == (0, "")
    direct, through, restarted = (
        [{key: line[key] for key in ("home", "index", "kind", "question", "expected")} for line in read_lines(path)]
        for path in files
    )
    assert direct == through == restarted
    assert len(direct) == 4


def test_a_broker_that_the_daemon_does_not_read_is_named(
    tiny_package: Path, tmp_path: Path, mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(respondents, "READ_S", 0.2)
    broker = f"127.0.0.1:{mosquitto.port}"
    with serving(tmp_path, {"model": {"path": str(tiny_package), "threads": 1}}) as daemon:
        respondent = DaemonRespondent(daemon.wait_ready().target, broker)
        with pytest.raises(Unavailable, match=f"hears nothing of what is sent to {broker}"):
            respondent.__enter__()


def test_a_table_shows_kinds_sums_and_wrong_answers(tiny_package: Path) -> None:
    result = iotd(str(tiny_package), "--questions", "5", "--show-wrong", "2")
    assert (result.returncode, result.stderr) == (0, "")
    head, *rows = result.stdout.splitlines()
    assert head.split() == ["kind", "asked", "right", "accuracy", "95", "%", "interval", "drawn"]
    assert any(row.split()[:3] == ["overall", "5", "0"] for row in rows)
    assert any(row.startswith("with mischief before") for row in rows)
    assert result.stdout.count("\n  answer ") == result.stdout.count("\n  expected ") == 2
    assert "\x1b" not in result.stdout


def test_json_is_one_object(tiny_package: Path) -> None:
    result = iotd(str(tiny_package), "--questions", "5", "--show-wrong", "1", "--json")
    told = json.loads(result.stdout)
    interval = pytest.approx([0.0, 0.4345], abs=1e-4)
    assert told["overall"] == {"asked": 5, "right": 0, "accuracy": 0.0, "interval": interval}
    assert told["overall"]["asked"] == sum(kind["asked"] for kind in told["kinds"].values())
    assert told["drawn"]["asked"] == sum(kind["asked"] for kind in told["drawn_kinds"].values()) == 5
    assert told["calibration"] is None or told["calibration"]["asked"] <= 5
    assert told["without_mischief_before"]["asked"] + told["with_mischief_before"]["asked"] == 5
    assert len(told["wrong"]) == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "give either PACKAGE or --target"),
        (["/no", "--target", "127.0.0.1:1"], "give either PACKAGE or --target"),
        (["--target", "127.0.0.1:1"], "--target and --broker go together"),
        (["--target", "127.0.0.1:1", "--broker", "127.0.0.1:1", "--through-daemon"], "--through-daemon"),
        (["/no", "--restart-every", "3"], "--through-daemon"),
    ],
)
def test_wrong_usage_is_told(args: list[str], said: str) -> None:
    result = CliRunner().invoke(commands, ["eval", *args])
    assert result.exit_code == 2
    assert said in result.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["/no"], "/no is not a model package"),
        (["/no", "--through-daemon"], "/no is not a model package"),
        (["--target", "127.0.0.1:1", "--broker", "127.0.0.1:1"], "no iotd reached at 127.0.0.1:1"),
        (["--target", "127.0.0.1:1", "--broker", "nonsense"], "the broker is 'nonsense'"),
    ],
)
def test_what_cannot_be_asked_is_said_in_a_sentence(args: list[str], said: str) -> None:
    result = CliRunner().invoke(commands, ["eval", *args])
    assert isinstance(result.exception, IotdError)
    assert said in str(result.exception)


def test_a_model_that_cannot_see_is_refused(tmp_path: Path) -> None:
    convert_random("tiny", tmp_path / "blind", recipe="fp32", vision=False)
    with pytest.raises(InvalidInput, match="without vision"):
        PackageRespondent(tmp_path / "blind", threads=1)
