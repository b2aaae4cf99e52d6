"""The engine over a real package: what it answers is what the model says to the same conversation."""

import re
from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from engine_driver import NOON_S, DrivenEngine, Sink, image, reading

from iotd.engine.entry import Image
from iotd.engine.feed import encode
from iotd.engine.lines import Lines
from iotd.events import RGB, Done, Frame
from iotd.model import Model, State

SYSTEM = "Answer briefly."
DATE = datetime.fromtimestamp(NOON_S).strftime("[%Y-%m-%d %A]\n")


@pytest.fixture(scope="module")
def model(tiny_package: Path) -> Iterator[Model]:
    yield Model.open(tiny_package, threads=1)


def make_engine(model: Model, **settings: object) -> DrivenEngine:
    return DrivenEngine(model, **{"window": 1024, "reserve_tokens": 512, "system": SYSTEM, **settings})  # type: ignore[arg-type]


def stream(first: int, last: int) -> str:
    stamps = [datetime.fromtimestamp(NOON_S + n).strftime("[%H:%M:%S]") for n in range(first, last)]
    return DATE + "".join(f"{stamp} s on{n}\n" for n, stamp in zip(range(first, last), stamps, strict=True))


def observe(engine: DrivenEngine, first: int, last: int) -> None:
    for n in range(first, last):
        engine.observe(reading(n))
        engine.settle()


def generate(model: Model, content: object, n_tokens: int) -> str:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
    return "".join(model.generate(messages, max_tokens=n_tokens, temperature=0.0, presence_penalty=0.0))


def test_an_answer_over_the_stream_is_that_to_one_whole_prompt(model: Model) -> None:
    engine = make_engine(model)
    observe(engine, 0, 12)
    assert engine.answer(" how warm? ", max_tokens=24) == generate(model, stream(0, 12) + "how warm?", 24)


def test_an_answer_about_a_camera_is_that_to_one_whole_prompt(model: Model) -> None:
    engine = make_engine(model)
    shot = noise(1)
    engine.observe(Frame("door", shot, NOON_S))
    engine.settle()
    stamp = datetime.fromtimestamp(NOON_S).strftime("[%H:%M:%S]")
    seen = [{"type": "text", "text": f"{stamp} camera door: "}, {"type": "image", "image": shot}]
    content = [{"type": "text", "text": DATE}, *seen, {"type": "text", "text": "\n"}, *seen]
    content.append({"type": "text", "text": "\nwho?"})
    assert engine.answer("who?", camera="door", max_tokens=24) == generate(model, content, 24)


def test_an_answer_about_images_alone_is_that_to_one_whole_prompt(model: Model) -> None:
    engine = make_engine(model, reserve_tokens=1024)
    observe(engine, 0, 3)
    pictures = (noise(2), noise(3, 320, 256))
    answer = engine.answer("which?", images=pictures, use_context=False, max_tokens=24)
    content: list[object] = []
    for picture in pictures:
        content += [{"type": "image", "image": picture}, {"type": "text", "text": "\n"}]
    assert answer == generate(model, [*content, {"type": "text", "text": "which?"}], 24)


def noise(seed: int, height: int = 256, width: int = 288) -> RGB:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def logits(model: Model, state: State) -> np.ndarray:
    """After one more token, on a copy."""
    return model.prefill(state.copy(), [65])


def test_after_a_swap_the_state_is_that_of_reading_its_events_from_scratch(model: Model) -> None:
    engine = make_engine(model, window=512)
    observe(engine, 0, 80)
    assert engine.status().counters["context_swaps"] >= 2
    fresh = make_engine(model, window=512)
    observe(fresh, round(engine.status().oldest_event_s - NOON_S), 80)
    assert fresh.live.position == engine.live.position
    assert np.abs(logits(model, engine._context.live) - logits(model, fresh._context.live)).max() < 1e-3


def test_a_fork_never_changes_its_parent(model: Model) -> None:
    engine = make_engine(model)
    observe(engine, 0, 10)
    before = engine._context.live.copy()
    for n in range(3):
        engine.answer(f"{n}?", max_tokens=8, images=(noise(n),))
    after = engine._context.live
    assert after.position == before.position
    for name, tensor in before.tensors.items():
        used = np.s_[:, :, : before.position] if name.startswith(("key.", "value.")) else np.s_[:]
        assert np.array_equal(after.tensors[name][used], tensor[used]), name


def test_guessing_at_its_words_changes_no_answer_and_no_session(model: Model) -> None:
    said: list[list[str]] = []
    for drafting in (False, True):
        engine = make_engine(model, drafting=drafting)
        observe(engine, 0, 12)
        answers = []
        session = None
        for question in ("how warm?", "how warm?", "and now?"):
            sink, _ = engine.ask(question, max_tokens=40, session=session, keep_session=True)
            engine.settle()
            assert isinstance(sink.end, Done)
            session = sink.end.session
            answers.append(sink.text)
        said.append([*answers, engine.answer("how warm?", max_tokens=8)])
    assert said[0] == said[1]


def test_20_000_tokens_leave_the_memory_where_2_000_left_it(model: Model) -> None:
    engine = make_engine(model, chunk_tokens=64)
    resident = [resident_nbytes()]
    for n in range(100_000):
        engine.observe(reading(n))
        if n % 16 == 0:
            engine.settle()
            read = engine.status().counters["context_tokens_read"]
            if len(resident) == 1 and read >= 2_000:
                resident.append(resident_nbytes())
            if read >= 20_000:
                break
    resident.append(resident_nbytes())
    assert resident[2] - resident[1] < 2 * 1024**2


@pytest.mark.parametrize(("height", "width"), [(480, 640), (720, 1280), (1000, 1000), (64, 64)])
def test_an_image_has_sizes_below_the_smallest_of_its_processor(tiny_package: Path, height: int, width: int) -> None:
    """At the default bound that smallest size is the largest, too. Each of them is made as it is counted."""
    model = Model.open(tiny_package, threads=1, max_image_pixels=65_536)
    assert model.spec.vision is not None and model.spec.vision.min_pixels == 65_536
    lines, rgb = Lines(model, max_tokens=512), np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    rungs = lines.ladder((height, width), 512)
    assert len(rungs) > 1 and lines.n_fine((height, width), rungs) == 1
    assert all(2 * after.n_tokens <= before.n_tokens for before, after in pairwise(rungs))
    images = [Image(rgb, *sized) for sized in rungs]
    for made in images:
        encode(model, made)
        assert made.embedding is not None
        assert made.n_tokens == len(made.embedding) == model.image_tokens(made.grid)
    np.testing.assert_array_equal(model.encode_image(rgb), images[0].embedding)


def resident_nbytes() -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def test_usage_counts_what_the_model_read(model: Model) -> None:
    engine = make_engine(model)
    sink, _ = engine.ask("how?", images=(image(height=256, width=256),), max_tokens=3)
    engine.settle()
    assert isinstance(sink, Sink) and isinstance(sink.end, Done)
    usage = sink.end.usage
    assert usage.image_tokens == 64
    assert usage.context_tokens + usage.prompt_tokens + usage.generation_tokens - 1 == engine.fork.position
