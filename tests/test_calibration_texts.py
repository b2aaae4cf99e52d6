"""What checkpoints are calibrated on: the project's texts, made-up homes and their conversations, and pictures."""

import gzip
import itertools
import json
import os
import random
import re
from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from iotd.config import DEFAULT_SYSTEM
from iotd.convert.chat import CHATML
from iotd.convert.random import random_tokenizer_json
from iotd.convert.samples import KINDS, OWN, Texts, pictures, read_lines, sequences
from iotd.convert.samples.blocks import LANGUAGES, Part
from iotd.convert.samples.chats import Writer, exact_line, hint, talks
from iotd.convert.samples.homes import Home, Said, Stream, homes
from iotd.convert.samples.passages import languages, packed, registers
from iotd.convert.samples.questions import KINDS as QUESTION_KINDS
from iotd.convert.samples.questions import phrases
from iotd.convert.tokenizer import compile_tokenizer
from iotd.demo.package import CHECKPOINT
from iotd.engine import lines as daemon
from iotd.engine.ledger import Figures, describe
from iotd.errors import InvalidInput
from iotd.events import Reading
from iotd.model.tokenizer import Tokenizer

PARTS: tuple[Part, ...] = ("fit", "held")
TOKENIZERS = ("demo", "bytes", "real")
OPENING = re.compile(r"(?:<\|im_start\|>system\n(?P<system>.*?)<\|im_end\|>\n)?<\|im_start\|>user\n", re.DOTALL)
EXCHANGE = re.compile(
    r"(?P<turn>.*?)<\|im_end\|>\n<\|im_start\|>assistant\n<think>\n(?P<thoughts>.*?)\n</think>\n\n"
    r"(?P<answer>.*?)<\|im_end\|>\n<\|im_start\|>user\n",
    re.DOTALL,
)
STREAM = re.compile(r"(?:\[|exact ).*\n")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    compile_tokenizer(CHECKPOINT / "tokenizer.json", folder / "demo")
    compile_tokenizer(random_tokenizer_json(400), folder / "bytes")
    if shared := os.environ.get("IOTD_SHARED"):
        document = json.loads(gzip.decompress((Path(shared) / "real" / "tokenizer.json.gz").read_bytes()))
        compile_tokenizer(document, folder / "real")
    return {path.name: Tokenizer.open(path) for path in folder.iterdir()}


def chosen(tokenizers: dict[str, Tokenizer], name: str) -> Tokenizer:
    if name not in tokenizers:
        pytest.skip("IOTD_SHARED names no folder with the real tokenizer")
    return tokenizers[name]


@pytest.fixture
def demo(tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers["demo"]


def as_lists(texts: Texts) -> list[tuple[str, list[int]]]:
    return [(sequence.kind, sequence.ids.tolist()) for sequence in (*texts.fit, *texts.held)]


def own_lines(n: int) -> list[str]:
    return [f"[07:{i // 60 % 60:02}:{i % 60:02}] my own sensor {i} °C" for i in range(n)]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("chat", [CHATML, None], ids=["chat", "plain"])
def test_every_kind_has_its_share_of_the_tokens_with_any_vocabulary(
    tokenizers: dict[str, Tokenizer], name: str, chat: Any
) -> None:
    """Half of what is fitted to is English prose; a quarter as much is held back, in equal shares.

    All sequences have just the length that was asked for.
    """
    texts = sequences(chosen(tokenizers, name), chat, n_tokens=16384)
    expected = {"prose": 15, "languages": 5, "sensor": 6, "chat": 6}, dict.fromkeys(KINDS, 2)
    for part, n in zip((texts.fit, texts.held), expected, strict=True):
        assert Counter(sequence.kind for sequence in part) == n
        assert all(sequence.ids.shape == (512,) and sequence.ids.dtype == np.int64 for sequence in part)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_one_seed_gives_one_set(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = chosen(tokenizers, name)
    first, again, other = (sequences(tokenizer, CHATML, n_tokens=4096, seed=seed) for seed in (3, 3, 4))
    assert as_lists(first) == as_lists(again) != as_lists(other)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_is_held_back_was_not_fitted_to(tokenizers: dict[str, Tokenizer], name: str) -> None:
    """No sequence of any kind, nor any one twice."""
    everything = [tuple(ids) for _, ids in as_lists(sequences(chosen(tokenizers, name), CHATML, extra=own_lines(2000)))]
    assert len(everything) == len(set(everything))


def test_the_parts_share_no_passage_of_fifty_characters() -> None:
    """Of prose; and neither a home, a question, nor a way to ask."""
    fit, held = (
        {
            " ".join(passage.split())
            for group in (*registers(part).values(), *languages(part).values())
            for passage in group
        }
        for part in PARTS
    )
    pieces = {passage[i : i + 50] for passage in fit for i in range(len(passage) - 49)}
    assert not any(passage[i : i + 50] in pieces for passage in held for i in range(len(passage) - 49))
    for read in (homes, phrases, talks):
        first, second = ({str(item) for item in read(part)} for part in PARTS)
        assert first and second and not first & second


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("groups", [registers, languages])
def test_pieces_of_all_registers_and_languages_are_taken(
    tokenizers: dict[str, Tokenizer], name: str, part: Part, groups: Any
) -> None:
    """By default, however many tokens a text makes; of the many registers that are held back, ten at least."""
    texts, tokenizer = groups(part), chosen(tokenizers, name)
    made = packed(texts, tokenizer, random.Random(0), n_sequences=8 if part == "fit" else 2, length=512)
    written = tokenizer.decode(token for ids in made for token in ids)
    found = [any(passage[at : at + 20] in written for passage in texts[group] for at in (0, 5)) for group in texts]
    assert sum(found) >= (len(texts) if part == "fit" else 10)


def test_texts_are_of_ten_languages_and_mostly_english() -> None:
    """Each other language has a few paragraphs in both parts, and homes or questions besides."""
    for part in PARTS:
        assert set(languages(part)) == set(LANGUAGES)
        assert all(len(passages) >= 2 for passages in languages(part).values())
        n_english, n_others = (
            sum(len(passage) for group in groups(part).values() for passage in group)
            for groups in (registers, languages)
        )
        assert n_english > n_others
    assert {home.language for home in homes("fit")} == {*LANGUAGES, "en"}


def test_passages_are_used_up_before_anything_repeats(demo: Tokenizer) -> None:
    """And where they end, lines and conversations fill the rest."""
    texts = sequences(demo, CHATML, n_tokens=300_000)
    n = Counter(sequence.kind for sequence in texts.fit)
    assert n.total() == 300_000 // 512
    assert n["languages"] < n["prose"] < n["sensor"]
    written = demo.decode(token for sequence in texts.fit if sequence.kind == "languages" for token in sequence.ids)
    assert written.count("Der Brunnen im Hof") == 1


def model_of(tokenizer: Tokenizer) -> daemon.Lines:
    return daemon.Lines(cast(Any, SimpleNamespace(chat=CHATML, tokenizer=tokenizer)), max_tokens=400)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_conversations_have_the_tokens_that_the_daemon_feeds(tokenizers: dict[str, Tokenizer], name: str) -> None:
    """Each sequence's text, taken apart and written by the engine's own words, piece by piece, gives the same ids."""
    tokenizer = chosen(tokenizers, name)
    writer = Writer(tokenizer, CHATML, "fit", length=1500)
    exchanges = []
    for ids in writer.conversations(random.Random(1), 40):
        again, found = as_the_daemon(tokenizer.decode(ids, skip_special=False), tokenizer)
        assert ids[: len(again)] == again
        exchanges += found
    assert sum(bool(found["thoughts"]) for found in exchanges) > 4
    assert sum(not found["thoughts"] for found in exchanges) > 20
    assert any("Answer in at most" in found["turn"] for found in exchanges)
    assert any("\nexact " in found["turn"] for found in exchanges)


def as_the_daemon(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[re.Match[str]]]:
    """A conversation up to its last whole exchange, as the engine tokenises it; and its exchanges."""
    lines = model_of(tokenizer)
    opening = OPENING.match(text)
    assert opening is not None
    ids = lines.opening(opening["system"] or "")
    at, exchanges = opening.end(), []
    while exchange := EXCHANGE.match(text, at):
        turn, thoughts = exchange["turn"], exchange["thoughts"]
        while line := STREAM.match(turn):
            ids += lines.plain(line[0])
            turn = turn[line.end() :]
        ids += [token for run in lines.question(turn, [], thinking=bool(thoughts)) for token in run]
        answer = f"{thoughts}\n</think>\n\n{exchange['answer']}" if thoughts else exchange["answer"]
        ids += tokenizer.encode(answer, special=True) + lines.next_turn()
        exchanges.append(exchange)
        at = exchange.end()
    return ids, exchanges


def test_lines_are_those_of_the_context(demo: Tokenizer) -> None:
    """Readings, what was skipped, dates, exact figures and the word about an answer's length."""
    stream = Stream(homes("fit")[0], random.Random(0))
    stream.now = datetime(2024, 6, 3, 14, 3, 5)
    seen = set()
    assert stream.date() == daemon.day_line(daemon.day_of(stream.now.timestamp()))
    for _ in range(400):
        for line in stream.lines():
            now = stream.now.timestamp()
            label = next((label for label in stream.told if line[11:].startswith(label)), "")
            skipped = re.search(r"skipped (\d+) older", line)
            if skipped:
                assert line == daemon.skipped_line(int(skipped[1]), now)
            elif label:
                assert line == daemon.reading_line(Reading(label, stream.told[label].text, now))
            else:
                assert line == stream.date()
            seen.add("skipped" if skipped else "reading" if label else "date")
    assert seen >= {"skipped", "reading"}
    assert hint(7) == daemon.hint(7)


def test_exact_figures_are_written_as_the_daemon_writes_them() -> None:
    """With a trend and without, and of a sensor that has no numbers."""
    said = Said("23.4 °C", "14:03:05", number=23.4, unit=" °C", decimals=1)
    trends = set()
    for seed in range(20):
        line = exact_line("kitchen", said, random.Random(seed))
        found = re.search(r"hours (.+?) to (.+?) °C, on average \S+ °C(?:; (.+) °C in)?", line)
        assert found is not None
        low, high = float(found[1]), float(found[2])
        trend = float(found[3]) if found[3] else None
        figures = Figures("kitchen", said.text, 0.0, " °C", low, high, (low + high) / 2, trend)
        assert line == describe(figures, "[14:03:05]")
        trends.add(trend is None)
    assert trends == {False, True}
    assert exact_line("door", Said("open", "14:03:05"), random.Random(0)) == describe(
        Figures("door", "open", 0.0), "[14:03:05]"
    )


@pytest.mark.parametrize("part", PARTS)
def test_every_way_to_ask_can_be_filled(part: Part) -> None:
    """Every kind of question is there, and every phrase's slots are those of its kind."""
    known = phrases(part)
    rng = random.Random(0)
    told = [told_by(home, rng) for home in homes(part)]
    for phrase in known:
        fills = [QUESTION_KINDS[phrase.kind](each, phrase.language, rng) for each in told]
        filled = [phrase.filled(fill) for fill in fills if fill is not None]
        assert filled, phrase
        assert all(each.ask and each.answer and "{label}" not in each.ask for each in filled)
    assert {phrase.kind for phrase in known} == set(QUESTION_KINDS)
    assert {home.language for home in homes(part)} <= {phrase.language for phrase in known}


def told_by(home: Home, rng: random.Random) -> dict[str, Said]:
    stream = Stream(home, rng)
    for _ in range(200):
        stream.lines()
    return stream.told


def test_answers_follow_from_the_lines() -> None:
    """Of values, comparisons, lists and JSON, checked against what the sensors said last."""
    told = {
        "oven": Said("180 °C", "10:00:00", number=180.0, unit=" °C", before="120 °C"),
        "room": Said("21.5 °C", "10:00:07", number=21.5, unit=" °C", decimals=1),
        "door": Said("open", "10:00:09", states=("open", "closed")),
        "hatch": Said("open", "10:00:11", states=("open", "closed")),
    }
    drawn: dict[str, list[Any]] = {
        kind: [QUESTION_KINDS[kind](told, "en", random.Random(seed)) for seed in range(40)] for kind in QUESTION_KINDS
    }
    assert all(each["value"] == told[each["label"]].text for each in drawn["any"])
    assert all((each["truth"] == "Yes") == (each["state"] == "open") for each in drawn["state"])
    assert all((each["more"], each["difference"]) == ("oven", "158 °C") for each in drawn["pair"])
    assert all((each["labels"], each["n"]) == ("door, hatch", 2) for each in drawn["list"])
    assert all((each["before"], each["value"]) == ("120 °C", "180 °C") for each in drawn["change"])
    for each in drawn["number"]:
        above = told[each["label"]].number > float(each["limit"].split()[0])
        assert (each["truth"] == "Yes") is above is json.loads(each["flag"])["above"]
        assert json.loads(each["json"])["value"] == told[each["label"]].number
    assert all(
        text == told[label].text for each in drawn["several"] for label, text in json.loads(each["json"]).items()
    )


def test_readings_drift_within_their_bounds() -> None:
    """And meters only rise."""
    home = Home("en", {"gas meter": "<+8841.120..8899.930> m³", "grid frequency": "<49.87..50.13> Hz"})
    stream = Stream(home, random.Random(5))
    meter, frequency = [], []
    for line in itertools.chain.from_iterable(stream.lines() for _ in range(300)):
        if " gas meter " in line:
            meter.append(float(line.split()[3]))
        elif " grid frequency " in line:
            frequency.append(float(line.split()[3]))
    assert meter == sorted(meter) and meter[0] < meter[-1]
    assert all(49.87 <= value <= 50.13 for value in frequency) and len(set(frequency)) > 10


def test_the_users_lines_take_a_third_and_their_last_fifth_is_held_back(demo: Tokenizer) -> None:
    """Read as the context has them: behind the daemon's system prompt, control tokens in them mere characters."""
    lines = own_lines(2000)
    lines[0] += " <|im_end|>"
    texts = sequences(demo, CHATML, length=256, n_tokens=12288, extra=[f"{line}\n" for line in lines])
    fit, held = ([each.ids for each in part if each.kind == OWN] for part in (texts.fit, texts.held))
    assert (len(fit), len(held)) == (16, 4)
    assert (len(texts.fit), len(texts.held)) == (48, 12)
    opening = model_of(demo).opening(DEFAULT_SYSTEM)
    begin = opening if len(opening) <= 256 // 3 else model_of(demo).opening("")
    assert fit[0].tolist()[: len(begin) + 20] == begin + demo.encode(f"{lines[0]}\n{lines[1]}\n")[:20]
    numbers = [
        {int(number) for ids in part for number in re.findall(r"sensor (\d+) ", demo.decode(ids.tolist()))}
        for part in (fit, held)
    ]
    assert max(numbers[0]) < 1600 <= min(numbers[1])
    assert min(numbers[0]) == 0 and max(numbers[0]) > 1400


@pytest.mark.parametrize("n", [1, 4, 12, 60])
def test_too_few_lines_of_the_user_are_refused(demo: Tokenizer, n: int) -> None:
    """The message says how many there are, and how much a sequence takes."""
    with pytest.raises(InvalidInput, match=r"too few lines to calibrate with: \d+ of them make \d+ tokens.*takes \d+"):
        sequences(demo, CHATML, extra=own_lines(n))


def test_a_line_without_an_end_is_cut(demo: Tokenizer) -> None:
    """As one of millions of characters would take minutes."""
    texts = sequences(demo, CHATML, extra=["9" * 3_000_000] * 20)
    assert all(len(sequence.ids) == 512 for sequence in texts.fit)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n\t\n", "is empty"),
        ("[07:00:00] küche 21 °C\n".encode("latin-1"), "is not UTF-8: byte 0xfc at 12"),
        (None, "cannot read .*No such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "lines.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        read_lines(path)


def test_lines_of_a_file_are_read_without_blank_ones(tmp_path: Path) -> None:
    """With a byte order mark or without, whatever ends its lines."""
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufeff[07:00:00] küche 21 °C\r\n\n[07:00:01] tür zu".encode())
    assert read_lines(path) == ["[07:00:00] küche 21 °C", "[07:00:01] tür zu"]


@pytest.mark.parametrize(("length", "n_tokens"), [(16, 16384), (512, 256)])
def test_too_little_room_is_refused(demo: Tokenizer, length: int, n_tokens: int) -> None:
    with pytest.raises(InvalidInput, match="are needed"):
        sequences(demo, CHATML, length=length, n_tokens=n_tokens)


def test_few_tokens_give_shorter_sequences_of_every_kind(demo: Tokenizer) -> None:
    texts = sequences(demo, CHATML, n_tokens=1024)
    assert Counter(sequence.kind for sequence in texts.fit) == dict.fromkeys(KINDS, 1)
    assert {len(sequence.ids) for sequence in texts.fit} == {256}
    assert {len(sequence.ids) for sequence in texts.held} == {64}


def test_a_template_without_system_prompt_or_thinking_is_served(demo: Tokenizer) -> None:
    """Neither is then written."""
    template = replace(
        CHATML,
        system=None,
        generation="<|im_start|>assistant\n",
        generation_thinking="<|im_start|>assistant\n",
        thinking_end="",
    )
    for ids in Writer(demo, template, "fit", 512).conversations(random.Random(0), 10):
        text = demo.decode(ids, skip_special=False)
        assert text.startswith("<|im_start|>user\n") and "think>" not in text


def test_pictures_are_varied_and_the_same_for_one_seed() -> None:
    """By day and by night, of many sizes; more of them begin with the same ones."""
    few, many, other = pictures(3, seed=1), pictures(12, seed=1), pictures(3, seed=2)
    assert all(np.array_equal(a, b) for a, b in zip(few, many, strict=False))
    assert not any(a.shape == b.shape and np.array_equal(a, b) for a, b in zip(few, other, strict=True))
    assert all(rgb.dtype == np.uint8 and rgb.ndim == 3 and rgb.shape[2] == 3 for rgb in many)
    assert all(224 <= side <= 512 for rgb in many for side in rgb.shape[:2])
    assert len({rgb.shape for rgb in many}) > 8
    means = [rgb.mean() for rgb in many]
    assert min(means) < 50 and max(means) > 110
    assert all(rgb.std() > 2 for rgb in many)


def test_pictures_have_the_spectrum_of_photographs() -> None:
    """Amplitude falls with frequency, by day, between as 1 / f ** 0.5 and as 1 / f ** 2."""
    slopes = [slope(rgb.mean(axis=2)) for rgb in pictures(8, seed=3) if rgb.mean() > 60]
    assert len(slopes) > 3
    assert -2 < np.median(slopes) < -0.5


def slope(grey: np.ndarray) -> float:
    """Of the logarithm of amplitude over that of frequency."""
    side = min(grey.shape)
    amplitude = np.abs(np.fft.fft2(grey[:side, :side] - grey.mean()))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    used = (frequency > 0.02) & (frequency < 0.3)
    return float(np.polyfit(np.log(frequency[used]), np.log(amplitude[used] + 1e-6), 1)[0])
