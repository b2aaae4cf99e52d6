"""What is read for one ask: counted before its turn, from any thread, and made when its turn comes.

Knows no queue, no deadline and no cost.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from iotd.engine.backlog import Backlog, Shot
from iotd.engine.context import Context
from iotd.engine.entry import Image, Part, Tokens, count_tokens
from iotd.engine.ledger import Ledger
from iotd.engine.lines import Lines, hint
from iotd.engine.plan import Picture, Planned, Work
from iotd.engine.sessions import Sessions
from iotd.errors import ContextOverflow, NotFound
from iotd.events import RGB, Ask
from iotd.model import Model
from iotd.model.labels import run_sizes
from iotd.model.state import State

MAX_EXACT = 16
"""Sensors whose exact figures stand before one question, at most."""
WORDS_PER_TOKEN = 0.5
"""English has some 0.7, lists of figures fewer; and models are poor at counting."""
LEAST_WORDS = 2
"""The fewest that a model is told to answer in."""

See = Callable[[Shot | RGB, int], Any]
"""What stands for an image of at most so many tokens."""


@dataclass(frozen=True)
class Prompts:
    """Makes the prompts of one engine."""

    model: Model
    lines: Lines
    context: Context
    backlog: Backlog
    ledger: Ledger
    sessions: Sessions
    image_tokens: int
    """Most tokens that the images of one ask take together."""
    tell_length: bool
    """The model is told how many words there is time for."""

    def parent(self, ask: Ask) -> State:
        """What the answer goes on from. Raises NotFound."""
        if ask.session is not None:
            return self.sessions.get(ask.session).state
        return self.context.live if ask.use_context else self.context.blank

    def work(self, ask: Ask) -> Work:
        """What answering takes, but for what is caught up with. Raises NotFound, ContextOverflow or InvalidInput."""
        parent = self.parent(ask)
        paths = self.model.label_paths(ask.labels.texts) if ask.labels is not None else []
        parts = self._parts(ask, self._picture, thinking=ask.sampling.thinking, words=0)
        counted = [part if isinstance(part, Picture) else len(part) for part in parts]
        least = sum(part.sizes[-1] if isinstance(part, Picture) else part for part in counted)
        available = parent.available - max([1, *map(len, paths)])
        if least > available:
            raise ContextOverflow(least, available)
        return Work(
            kind="labels" if paths else "form" if ask.format is not None else "text",
            position=parent.position,
            parts=_joined(counted),
            max_tokens=ask.sampling.max_tokens,
            thinking=ask.sampling.thinking,
            hint_tokens=self._hint_tokens if ask.format is None and not paths else 0,
            beside=tuple(run_sizes(paths)),
            room=parent.available,
        )

    @cached_property
    def _hint_tokens(self) -> int:
        return len(self.lines.plain(hint(99))) + 1 if self.tell_length else 0

    def make(self, ask: Ask, planned: Planned, *, catch_up_tokens: int) -> list[Part]:
        """The whole prompt. catch_up_tokens: what a session may read of the stream, at most.

        Raises NotFound or ContextOverflow.
        """
        plan, rung = planned.plan, planned.rung
        words = max(LEAST_WORDS, int(plan.answer_tokens * WORDS_PER_TOKEN)) if planned.hint else 0

        def image(seen: Shot | RGB, each: int) -> Image:
            return self._image(seen, each, rung)

        thinking = plan.thinking_tokens > 0
        parts: list[Part] = self._parts(ask, image, thinking=thinking, words=words, catch_up_tokens=catch_up_tokens)
        needed, available = count_tokens(parts), self.parent(ask).available - 1
        if needed > available:
            raise ContextOverflow(needed, available)
        return parts

    def _parts(self, ask: Ask, see: See, *, thinking: bool, words: int, catch_up_tokens: int = 0) -> list[Any]:
        """Tokens, and what `see` makes of images."""
        parts: list[Any] = []
        if ask.session is not None:
            session = self.sessions.get(ask.session)
            parts.append(session.unread + self.lines.next_turn())
            if ask.catch_up and catch_up_tokens > 0:
                most = min(catch_up_tokens, self._room(ask) // 2)
                parts.extend(self.context.since(session.n_read, most))
        if ask.exact_readings:
            parts.extend(self._exact(ask))
        if ask.camera is not None:
            shot = self.backlog.newest(ask.camera)
            if shot is None:
                raise NotFound(f"camera {ask.camera!r} is not known any more")
            parts.extend(self.lines.camera(shot, see(shot, self.lines.frame_tokens(shot))))
        each = self.image_tokens // max(len(ask.images), 1)
        images = [see(rgb, each) for rgb in ask.images]
        return parts + self.lines.question(ask.question, images, thinking=thinking, words=words)

    def _picture(self, seen: Shot | RGB, most: int) -> Picture:
        image = seen.image if isinstance(seen, Shot) else None
        if image is not None and image.embedding is not None:
            return Picture((image.n_tokens,), encoded=True)
        rgb = _pixels(seen)
        if rgb is None:  # between the two looks they were encoded
            return self._picture(seen, most)
        rungs = self.lines.ladder(rgb.shape[:2], most)
        return Picture(tuple(sized.n_tokens for sized in rungs), n_fine=self.lines.n_fine(rgb.shape[:2], rungs))

    def _image(self, seen: Shot | RGB, most: int, rung: int) -> Image:
        """The frame's own image, which the context reads too, unless a smaller one is wanted in its place."""
        if isinstance(seen, Shot) and (rung == 0 or (seen.image is not None and seen.image.embedding is not None)):
            self.lines.frame(seen)
            assert seen.image is not None
            return seen.image
        rgb = _pixels(seen)
        assert rgb is not None  # nothing but the model's thread, on which this runs, lets go of them
        rungs = self.lines.ladder(rgb.shape[:2], most)
        return Image(rgb, *rungs[min(rung, len(rungs) - 1)])

    def _exact(self, ask: Ask) -> list[Tokens]:
        """As many sensors as fit into a quarter of what is free."""
        lines = self.lines.exact(self.ledger.find(ask.question, ask.sensors, MAX_EXACT))
        room = self._room(ask) // 4
        ends = accumulate(map(len, lines))
        return [line for line, end in zip(lines, ends, strict=True) if end <= room]

    def _room(self, ask: Ask) -> int:
        """Tokens that can still be read, but for those that a session has not read yet."""
        n_unread = len(self.sessions.get(ask.session).unread) if ask.session is not None else 0
        return self.parent(ask).available - n_unread


def _pixels(seen: Shot | RGB) -> RGB | None:
    """None where an image was made of them and is encoded."""
    if not isinstance(seen, Shot):
        return seen
    rgb, image = seen.rgb, seen.image
    return image.rgb if rgb is None and image is not None else rgb


def _joined(parts: list[int | Picture]) -> tuple[int | Picture, ...]:
    """Neighbouring pieces of text as one, as they are read."""
    joined: list[int | Picture] = []
    for part in parts:
        if joined and isinstance(part, int) and isinstance(joined[-1], int):
            joined[-1] += part
        else:
            joined.append(part)
    return tuple(joined)
