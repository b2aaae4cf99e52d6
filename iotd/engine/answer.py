"""Answering one ask on a fork of the context, as units of work between which it can be stopped.

A unit is a fork, a chunk of prompt, an image encoded, or a step of decoding or of weighing labels. Knows no queue and
no thread.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from iotd.counters import Counters
from iotd.engine.backlog import Backlog
from iotd.engine.call import Call, Unit
from iotd.engine.context import Context
from iotd.engine.entry import Chunk, Part, Rows, Tokens, chunks, count_tokens
from iotd.engine.feed import Floats, Ints, encode, feed
from iotd.engine.ledger import Ledger
from iotd.engine.lines import Lines
from iotd.engine.sentences import Sentences
from iotd.engine.sessions import Session, Sessions
from iotd.errors import ContextOverflow, NotFound
from iotd.events import FinishReason, Labels
from iotd.model import Model
from iotd.model.generation import Generation
from iotd.model.labels import Path, Weighing
from iotd.model.state import State

SENTENCE_TOKENS = 24
"""With less time left than these take, a sentence is told when it is whole."""
MAX_EXACT = 16
"""Sensors whose exact figures stand before one question, at most."""


@dataclass(frozen=True, slots=True)
class Kit:
    """What every answer is made with."""

    model: Model
    lines: Lines
    context: Context
    backlog: Backlog
    ledger: Ledger
    sessions: Sessions
    fork: State
    """The one state that answers run on, in rows lent by the context; one answer at a time."""
    drafting: bool
    """Guess at the tokens that follow."""
    image_tokens: int
    """Most tokens that the images of one ask take together."""
    chunk_tokens: int
    clock: Callable[[], float]
    counters: Counters


class Answer:
    """One answer in the making."""

    def __init__(self, call: Call, kit: Kit) -> None:
        self._call = call
        self._kit = kit
        self._generation: Generation | None = None
        self._weighing: Weighing | None = None
        """In a generation's place, where the ask has labels."""
        self._free_text = call.ask.format is None
        self._sentences = Sentences()
        self._step_s = 0.0
        """What the last run took for each of its `run_tokens`."""
        self._session: Session | None = None
        self._units = self._work()

    def advance(self) -> FinishReason | None:
        """Run one unit, unless the ask is cancelled or its deadline has come. Returns why it ended, once it has.

        Raises ContextOverflow, NotFound or InvalidInput before anything ran, where it cannot be answered.
        """
        reason = self._stopped()
        if reason is None:
            next(self._units)
            reason = self._finished()
        if reason is not None and self._generation is not None:
            if reason is FinishReason.BUDGET:
                self._say(self._generation.close())
                self._call.meter.generation_tokens = self._generation.n_tokens
            self._say(self._generation.flush())
            cut_off = self._free_text and reason is FinishReason.BUDGET
            self._call.speak(self._sentences.rest(cut_off=cut_off), self._kit.clock())
            self._name_session(reason)
        return reason

    def close(self, *, well: bool) -> None:
        """Once the call has ended: keep where the answer stands, if that was asked for and it ended well."""
        # Its frame holds this answer and a row of logits: both would stay until the next full garbage collection.
        self._units.close()
        name, generation, kit = self._call.session, self._generation, self._kit
        if not name or generation is None:
            return
        if not well:
            if self._session is None:
                kit.sessions.drop(name)
            return
        session = kit.sessions.get(name)
        if session is self._session:
            session.state.take_over(generation.state)
        else:
            generation.state.copy_into(session.state)
        session.unread = generation.unread
        if self._session is None or self._call.ask.catch_up:
            session.n_read = kit.context.n_read

    def _name_session(self, reason: FinishReason) -> None:
        """Before the end is told: the name stands in it. The state is kept behind it, which takes its time."""
        ask = self._call.ask
        if reason is FinishReason.CANCELLED:
            return
        if ask.session is not None:
            self._call.session = ask.session
        elif ask.keep_session:
            self._call.session = self._kit.sessions.open()

    def _stopped(self) -> FinishReason | None:
        if self._call.cancelled:
            return FinishReason.CANCELLED
        now_s = self._kit.clock()
        if self._generation is not None and not self._free_text:
            # It can be closed at any time, so it need not be late by one more run.
            now_s += self._step_s * self._generation.run_tokens
        return FinishReason.BUDGET if self._call.expired(now_s) else None

    def _finished(self) -> FinishReason | None:
        if self._weighing is not None and self._weighing.done:
            self._call.weighed = self._weighing.result()
            return FinishReason.STOP
        return None if self._generation is None else self._generation.finish_reason

    def _work(self) -> Generator[None, None, None]:
        if self._call.ask.session is not None:
            self._session = self._kit.sessions.get(self._call.ask.session)
        prompt = self._prompt()
        labels = self._call.ask.labels
        paths = self._paths(labels, prompt) if labels is not None else []
        sampling, form = self._call.ask.sampling, self._call.ask.format
        constraint = self._kit.model.constraint(form, sampling.max_tokens) if form is not None else None
        self._fork()
        yield
        for chunk in prompt[:-1]:
            yield from self._encode(chunk)
            self._feed(chunk)
            yield
        if labels is not None:
            yield from self._weigh(labels, paths, prompt[-1])
            return
        logits = self._feed(prompt[-1], logits=True, only=constraint.allowed() if constraint is not None else None)
        assert logits is not None
        said = self._said(prompt) if self._kit.drafting else None
        self._generation = self._kit.model.generation(
            self._kit.fork, logits, sampling, said=said, constraint=constraint
        )
        while True:
            yield
            self._step(self._generation)

    def _paths(self, labels: Labels, prompt: list[Chunk]) -> list[Path]:
        """The tokens of each label. Raises InvalidInput, or ContextOverflow where one does not fit behind it all."""
        paths = self._kit.model.label_paths(labels.texts)
        needed, available = count_tokens(prompt) + max(map(len, paths)), self._parent.available
        if needed > available:
            raise ContextOverflow(needed, available)
        return paths

    def _weigh(self, labels: Labels, paths: Sequence[Path], chunk: Chunk) -> Iterator[None]:
        """Read the last chunk, and go on until nobody wants to know more."""
        model = self._kit.model
        logits = self._feed(chunk, logits=True, only=model.every_token)
        assert logits is not None
        self._weighing = model.weighing(self._kit.fork, logits, labels, paths)
        while True:
            yield
            with self._timed("prefill_s"):
                self._weighing.step()

    def _encode(self, chunk: Chunk) -> Iterator[None]:
        if isinstance(chunk, Rows) and chunk.image.embedding is None:
            with self._timed("image_s"):
                encode(self._kit.model, chunk.image)
            self._kit.counters.add("images_encoded")
            yield

    def _feed(self, chunk: Chunk, *, logits: bool = False, only: Ints | None = None) -> Floats | None:
        with self._timed("prefill_s"):
            found = feed(self._kit.model, self._kit.fork, chunk, logits=logits, only=only)
        n_tokens = count_tokens([chunk])
        self._call.meter.prompt_tokens += n_tokens
        if isinstance(chunk, Rows):
            self._call.meter.image_tokens += n_tokens
        return found

    def _step(self, generation: Generation) -> None:
        began_s = self._kit.clock()
        # A run of guesses takes up to four times as long as one of a single token: it would overshoot the deadline.
        near = self._call.ask.deadline_s - began_s < 4 * self._step_s
        run_tokens = generation.run_tokens
        with self._timed("decode_s"):
            piece = generation.step(guess=not near)
        if run_tokens:
            self._step_s = (self._kit.clock() - began_s) / run_tokens
        self._call.meter.generation_tokens = generation.n_tokens
        self._say(piece)

    def _prompt(self) -> list[Chunk]:
        """The whole prompt in chunks. Raises where something is missing or does not fit; nothing has run by then."""
        ask, kit = self._call.ask, self._kit
        parts: list[Part] = []
        if self._session is not None:
            parts.append(self._session.unread + kit.lines.next_turn())
            if ask.catch_up:
                parts.extend(kit.context.since(self._session.n_read, self._room // 2))
        if ask.exact_readings:
            parts.extend(self._exact())
        if ask.camera is not None:
            parts.extend(self._camera(ask.camera))
        each = kit.image_tokens // max(len(ask.images), 1)
        images = [kit.lines.image(rgb, each) for rgb in ask.images]
        parts.extend(kit.lines.question(ask.question, images, thinking=ask.sampling.thinking))
        needed, available = count_tokens(parts), self._parent.available - 1
        if needed > available:
            raise ContextOverflow(needed, available)
        # Even runs: a short one at the end would take as long as several tokens of a longer one.
        n_runs = max(1, round(needed / kit.chunk_tokens))
        return list(chunks(parts, lambda: -(-needed // n_runs)))

    def _said(self, prompt: list[Chunk]) -> Iterator[int]:
        """Tokens that the answer may quote; what a session has read long ago is not among them."""
        if self._session is not None or self._call.ask.use_context:
            yield from self._kit.context.said()
        for chunk in prompt:
            if not isinstance(chunk, Rows):
                yield from chunk

    @property
    def _parent(self) -> State:
        """What the answer goes on from. Nothing else runs before the answer has ended, so that it can lend its rows."""
        context = self._kit.context
        if self._session is not None:
            return self._session.state
        return context.live if self._call.ask.use_context else context.blank

    @property
    def _room(self) -> int:
        """Tokens that can still be read, those included that a session has not read yet."""
        return self._parent.available - (len(self._session.unread) if self._session is not None else 0)

    def _exact(self) -> list[Tokens]:
        """As many sensors as fit into a quarter of what is free."""
        ask, kit = self._call.ask, self._kit
        lines = kit.lines.exact(kit.ledger.find(ask.question, ask.sensors, MAX_EXACT))
        room = self._room // 4
        ends = accumulate(map(len, lines))
        return [line for line, end in zip(lines, ends, strict=True) if end <= room]

    def _camera(self, camera: str) -> tuple[Part, ...]:
        shot = self._kit.backlog.newest(camera)
        if shot is None:
            raise NotFound(f"camera {camera!r} is not known any more")
        return self._kit.lines.frame(shot).parts

    def _fork(self) -> None:
        with self._timed("prefill_s"):
            self._parent.lend_to(self._kit.fork)
        self._call.meter.context_tokens = self._kit.fork.position

    def _say(self, piece: str) -> None:
        now_s, meter = self._kit.clock(), self._call.meter
        step_s = meter.decode_s / max(1, meter.generation_tokens)
        near_end = self._free_text and self._call.ask.deadline_s - now_s < SENTENCE_TOKENS * step_s
        self._call.speak(self._sentences.push(piece, near_end=near_end), now_s)

    @contextmanager
    def _timed(self, name: Literal["image_s", "prefill_s", "decode_s"]) -> Iterator[None]:
        """Add what the block takes to a part of the call's time."""
        meter, began_s = self._call.meter, self._kit.clock()
        meter.unit = Unit(name.removesuffix("_s"), began_s)
        yield
        setattr(meter, name, getattr(meter, name) + self._kit.clock() - began_s)
