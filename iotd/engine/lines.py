"""Events and questions in the words the model reads: dated lines, frames, the open turn and its close.

Text from outside is tokenised as plain characters: a control token's name in a payload stays text. Each piece begins
with a visible character and ends with a line break, so that its tokens are those of the whole conversation in one.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from iotd.engine.backlog import Shot
from iotd.engine.entry import Entry, Image, Part, Tokens, count_tokens
from iotd.engine.ledger import Figures, describe
from iotd.errors import InvalidInput
from iotd.events import RGB, Reading
from iotd.model import Model
from iotd.model.chat import Segment, UserText
from iotd.model.endings import ends_sentence
from iotd.model.vision import Grid

CHARS_PER_TOKEN = 8
"""More characters than this for each token allowed are not even tokenised; text of real sensors has 2 to 5."""
LEAST_IMAGE_TOKENS = 16
"""An image is made no smaller: a quarter of the area that Qwen3.5's image processor makes at least. Its video processor
and its maker's own loader of images go down to 4 tokens. But of questions about pictures the demo's model answered 96 %
rightly at 25 tokens, the only size that it knows, 82 % at 16 and 34 % at 9 (`iotd eval --max-image-pixels`)."""
WIDE = 720, 1280
"""Height and width of a usual camera's frame."""
MAX_LABEL = 64
"""Characters of a camera's name that are shown to the model."""


class Sized(NamedTuple):
    """What an image becomes for the model."""

    size: tuple[int, int]
    """Height and width in pixels."""
    grid: Grid
    n_tokens: int


class Lines:
    """Renders for one model. `max_tokens` is the most that one event may take."""

    def __init__(self, model: Model, max_tokens: int) -> None:
        self._model = model
        self._max_tokens = max_tokens
        self._ellipsis = self.plain(" …\n")

    def opening(self, system: str) -> Tokens:
        """The system prompt and the beginning of the user's turn that stays open."""
        return self._text(self._model.chat.open_stream(system))

    def date(self, day: str) -> Tokens:
        """The line before the first event of a day."""
        return self.plain(day_line(day))

    def reading(self, reading: Reading) -> tuple[Entry, bool]:
        """One dated line; True where it was too long and is cut."""
        line = reading_line(reading)
        shown = line[: self._max_tokens * CHARS_PER_TOKEN]
        tokens = self.plain(shown)
        cut = len(shown) < len(line) or len(tokens) > self._max_tokens
        if cut:
            tokens = tokens[: self._max_tokens - len(self._ellipsis)] + self._ellipsis
        return _entry((tokens,), reading.time_s), cut

    def skipped(self, n_readings: int, time_s: float) -> Entry:
        """A line that says what the stream lacks."""
        return _entry((self.plain(skipped_line(n_readings, time_s)),), time_s)

    def frame(self, shot: Shot) -> Entry:
        """A camera's image behind its time and name, shrunk to what the context gives one event.

        Raises InvalidInput where even the smallest size is more than that.
        """
        if shot.image is None:
            assert shot.rgb is not None
            shot.image, shot.rgb = self.image(shot.rgb, self.frame_tokens(shot)), None
        return _entry(tuple(self.camera(shot, shot.image)), shot.time_s)

    def least_frame(self, camera: str) -> int:
        """Tokens that a frame of 16 : 9 takes at its smallest, with its words."""
        return self._frame_words(Shot(camera, 0.0, None)) + self._sized(WIDE, 0).n_tokens

    def frame_tokens(self, shot: Shot) -> int:
        """Most that a frame's image may take, besides its words."""
        return self._max_tokens - self._frame_words(shot)

    def _frame_words(self, shot: Shot) -> int:
        return count_tokens(part for part in self.camera(shot, None) if isinstance(part, list))

    def camera(self, shot: Shot, image: Any) -> list[Any]:
        """A frame's words around its image, or around what stands for it."""
        return self._picture(UserText(frame_line(shot.camera, shot.time_s)), image)

    def exact(self, figures: Iterable[Figures]) -> list[Tokens]:
        """A line for each sensor, with its exact figures."""
        return [self.plain(describe(each, _clock(each.time_s))) for each in figures]

    def next_turn(self) -> Tokens:
        """The end of an answer, and the beginning of the user's turn that follows it in a session."""
        return self._text(self._model.chat.next_turn())

    def question(self, text: str, images: Iterable[Any], *, thinking: bool, words: int = 0) -> list[Any]:
        """A question after its images, or what stands for them, closing the turn and opening the answer.

        words: that the answer may have, which the model is told; 0 tells nothing.
        """
        parts = [part for image in images for part in self._picture(UserText(""), image)]
        told = (" " if ends_sentence(text) else "\n") + hint(words) if words else ""
        return parts + self._runs([UserText(text.strip() + told), *self._model.chat.close_turn(thinking)])

    def image(self, rgb: RGB, max_tokens: int) -> Image:
        """An image that is still to be encoded, shrunk so that it takes at most `max_tokens`.

        Raises InvalidInput where the smallest size takes more.
        """
        return Image(rgb, *self.ladder(rgb.shape[:2], max_tokens)[0])

    def ladder(self, shape: tuple[int, ...], max_tokens: int) -> list[Sized]:
        """Of an image of this height and width: shrunk to so many tokens, to half of those it then takes, and so on.

        Down to LEAST_IMAGE_TOKENS. Raises InvalidInput where that takes more than `max_tokens`.
        """
        rungs: list[Sized] = []
        allowed = max_tokens
        while (sized := self._sized(shape, allowed)).n_tokens <= allowed:
            rungs.append(sized)
            allowed = sized.n_tokens // 2
        if not rungs:
            raise InvalidInput(
                f"the image takes {sized.n_tokens} tokens at least; {max_tokens} are free", field="images"
            )
        return rungs

    def n_fine(self, shape: tuple[int, ...], rungs: Sequence[Sized]) -> int:
        """How many of an image's rungs are no smaller than the checkpoint's processor makes it; one at least."""
        model, vision = self._model, self._model.spec.vision
        assert vision is not None
        least = model.image_tokens(model.image_grid(shape, vision.min_pixels))
        return max(1, sum(sized.n_tokens >= least for sized in rungs))

    def _sized(self, shape: tuple[int, ...], max_tokens: int) -> Sized:
        """It takes more tokens than allowed where nothing smaller is."""
        model, vision = self._model, self._model.spec.vision
        assert vision is not None
        most: int | None = None
        if model.image_tokens(model.image_grid(shape)) > max_tokens:
            of_a_token = vision.size_factor**2
            most = max(max_tokens * of_a_token, min(LEAST_IMAGE_TOKENS * of_a_token, vision.min_pixels))
        grid = model.image_grid(shape, most)
        return Sized(model.image_size(shape, most), grid, model.image_tokens(grid))

    def _picture(self, before: UserText, image: Any) -> list[Any]:
        return self._runs([before, *self._model.chat.image_segments(image), UserText("\n")])

    def _runs(self, segments: Iterable[Segment]) -> list[Any]:
        return self._model.chat.tokenize(segments, self._model.tokenizer)

    def _text(self, segments: Iterable[Segment]) -> Tokens:
        """Of segments without images."""
        return [token for run in self._runs(segments) for token in _ids(run)]

    def plain(self, text: str) -> Tokens:
        return self._model.tokenizer.encode(text, special=False)


def day_of(time_s: float) -> str:
    """Local date and weekday, such as `2026-03-01 Sunday`."""
    return datetime.fromtimestamp(time_s).strftime("%Y-%m-%d %A")


def day_line(day: str) -> str:
    return f"[{day}]\n"


def reading_line(reading: Reading) -> str:
    return f"{_clock(reading.time_s)} {reading.source} {reading.text}\n"


def skipped_line(n_readings: int, time_s: float) -> str:
    return f"{_clock(time_s)} skipped {n_readings} older reading{'' if n_readings == 1 else 's'}\n"


def frame_line(camera: str, time_s: float) -> str:
    """What stands before a camera's image; a line break stands behind it."""
    return f"{_clock(time_s)} camera {camera[:MAX_LABEL]}: "


def hint(words: int) -> str:
    """How long an answer may be."""
    return f"Answer in at most {words} words."


def _clock(time_s: float) -> str:
    return datetime.fromtimestamp(time_s).strftime("[%H:%M:%S]")


def _entry(parts: tuple[Part, ...], time_s: float) -> Entry:
    return Entry(parts, time_s, day_of(time_s), count_tokens(parts))


def _ids(run: Part) -> Tokens:
    assert isinstance(run, list)  # neither a system prompt nor a closing has images
    return run
