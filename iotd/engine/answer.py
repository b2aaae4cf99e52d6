"""Answering one ask on a fork of the context, as units of work between which it can be stopped.

A unit is a fork, a chunk of prompt, an image encoded, or a step of decoding or of weighing labels. Knows no queue and
no thread.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

from iotd.counters import Counters
from iotd.engine.call import Call, Unit
from iotd.engine.costs import Costs
from iotd.engine.entry import Chunk, Part, Rows, chunks, count_tokens
from iotd.engine.feed import Floats, Ints, encode, feed
from iotd.engine.lengths import Lengths
from iotd.engine.plan import LEAST_TOKENS, Planned, Planner, run_size
from iotd.engine.prompt import Prompts
from iotd.engine.sentences import Sentences
from iotd.engine.sessions import Session
from iotd.events import FinishReason, Labels, Plan
from iotd.model import Model
from iotd.model.generation import Generation, Said
from iotd.model.labels import Weighing
from iotd.model.state import State

SENTENCE_TOKENS = 24
"""With less time left than these take, a sentence is told when it is whole."""
HASTE_TOKENS = 12
"""With less time left than these take, the answer is led towards the end of its sentence, more with each token."""
MORE_TOKENS = 4
"""With less time left than these take, nothing is begun behind a whole sentence."""
GUESS_TOKENS = 8
"""A run of guesses takes up to four times as long as one of a single token: with less time left, none is made."""


@dataclass(frozen=True, slots=True)
class Kit:
    """What every answer is made with."""

    model: Model
    prompts: Prompts
    planner: Planner
    costs: Costs
    lengths: Lengths
    fork: State
    """The one state that answers run on, in rows lent by the context; one answer at a time."""
    drafting: bool
    """Guess at the tokens that follow."""
    chunk_tokens: int
    ends_s: Callable[[Call], float]
    """When the running answer must have ended, for the sake of asks that wait too."""
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
        self._session: Session | None = None
        self._parts: list[Part] = []
        """The prompt, once it is made."""
        self._units = self._work()

    def advance(self) -> FinishReason | None:
        """Run one unit, unless the ask is cancelled or there is no time for it. Returns why it ended, once it has.

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
            if reason is not FinishReason.CANCELLED:
                self._learn_length(reason)
            self._say(self._generation.flush())
            ending = self._ending
            cut_off = self._free_text and reason is FinishReason.BUDGET
            self._call.speak(self._sentences.rest(cut_off=cut_off), self._kit.clock(), ending=ending)
            self._name_session(reason)
        return reason

    def _learn_length(self, reason: FinishReason) -> None:
        meter, lengths, cut = self._call.meter, self._kit.lengths, reason is FinishReason.BUDGET
        if self._free_text:
            if meter.answer_tokens and not meter.whole_tokens:
                lengths.learn_sentence(meter.answer_tokens, whole=reason is FinishReason.STOP)
            if not cut:
                lengths.learn("text", meter.answer_tokens)
        elif not cut:
            lengths.learn("form", meter.runs)
            lengths.learn_run(meter.run_tokens / max(1, meter.runs))

    @property
    def unit_s(self) -> float:
        """What the next unit takes, where it is one of decoding."""
        return 0.0 if self._generation is None else self._run_s(slow=True)

    def preempt(self) -> None:
        """Another answer will use the fork: begin again at the next unit, and go on behind what was said."""
        self._units.close()
        if self._generation is None:
            self._call.meter.prompt_tokens = self._call.meter.image_tokens = 0
            self._units = self._work()
        else:
            self._units = self._again(self._generation)

    def close(self) -> None:
        """Once the call has ended: keep where the answer stands, if its asker was told that it is kept.

        The deadline's thread may have ended it before the name was known, or after.
        """
        # Its frame holds this answer and a row of logits: both would stay until the next full garbage collection.
        self._units.close()
        name, generation, kit = self._call.session, self._generation, self._kit
        if not name or generation is None:
            return
        sessions = kit.prompts.sessions
        if not self._call.told_session:
            if self._session is None:
                sessions.drop(name)
            return
        session = sessions.get(name)
        if session is self._session:
            session.state.take_over(generation.state)
        else:
            generation.state.copy_into(session.state)
        session.unread = generation.unread
        if self._session is None or self._call.ask.catch_up:
            session.n_read = kit.prompts.context.n_read

    def _name_session(self, reason: FinishReason) -> None:
        """Before the end is told: the name stands in it. The state is kept behind it, which takes its time."""
        ask = self._call.ask
        if reason is FinishReason.CANCELLED:
            return
        if ask.session is not None:
            self._call.session = ask.session
        elif ask.keep_session:
            self._call.session = self._kit.prompts.sessions.open()

    def _stopped(self) -> FinishReason | None:
        if self._call.cancelled:
            return FinishReason.CANCELLED
        if self._generation is None:
            return FinishReason.BUDGET if self._call.expired(self._kit.clock()) else None
        return None if self._runs_left() else FinishReason.BUDGET

    @property
    def _plan(self) -> Plan:
        assert self._call.planned is not None
        return self._call.planned.plan

    def _finished(self) -> FinishReason | None:
        if self._weighing is not None and self._weighing.done:
            self._call.weighed = self._weighing.result()
            return FinishReason.STOP
        return None if self._generation is None else self._generation.finish_reason

    def _runs_left(self) -> int:
        """Further runs of the model that there is time for; one at least until something was chosen."""
        assert self._generation is not None
        ends_s, said = self._call.ask.deadline_s, self._call.meter.answer_tokens
        if said >= LEAST_TOKENS or self._generation.thinking:
            ends_s = self._kit.ends_s(self._call)
        left_s = ends_s - self._kit.clock()
        usual_s, slow_s = self._run_s(), self._run_s(slow=True)
        if left_s < slow_s:
            return 0 if said else 1
        return 1 + int(min((left_s - slow_s) / usual_s, 1e6)) if usual_s else 1_000_000

    def _run_s(self, *, slow: bool = False) -> float:
        """What the next run takes."""
        generation, costs = self._generation, self._kit.costs
        assert generation is not None
        position = generation.state.position
        if self._free_text:
            return costs.step_s(position, slow=slow)
        return costs.form_s(len(generation.unread), position, slow=slow)

    def _work(self) -> Generator[None, None, None]:
        call, kit = self._call, self._kit
        if call.ask.session is not None:
            self._session = kit.prompts.sessions.get(call.ask.session)
        prompt = self._prompt()
        labels = call.ask.labels
        sampling, form = replace(call.ask.sampling, thinking=self._plan.thinking_tokens > 0), call.ask.format
        constraint = kit.model.constraint(form, sampling.max_tokens) if form is not None else None
        self._fork()
        yield
        for chunk in prompt[:-1]:
            yield from self._encode(chunk)
            self._feed(chunk)
            yield
        if labels is not None:
            yield from self._weigh(labels, prompt[-1])
            yield
        logits = self._feed(prompt[-1], logits=True, only=constraint.allowed() if constraint is not None else None)
        assert logits is not None
        said = self._said(prompt) if kit.drafting else None
        self._generation = kit.model.generation(kit.fork, logits, sampling, said=said, constraint=constraint)
        while True:
            yield
            self._step(self._generation)

    def _again(self, generation: Generation) -> Generator[None, None, None]:
        """Read all of it once more, over the context as it is by now, and go on."""
        self._fork()
        yield
        said = generation.tokens[: len(generation.tokens) - len(generation.unread)]
        for chunk in chunks([*self._parts, said], lambda: self._kit.chunk_tokens):
            with self._reading(count_tokens([chunk])):
                feed(self._kit.model, self._kit.fork, chunk)
            yield
        while True:
            self._step(generation)
            yield

    def _prompt(self) -> list[Chunk]:
        """The whole prompt in chunks, as it is planned by now. Raises where something is missing or does not fit."""
        call, kit = self._call, self._kit
        now_s = kit.clock()
        time_s = kit.ends_s(call) - now_s
        call.work = kit.prompts.work(call.ask)
        planned = self._planned(time_s)
        catch_up_tokens = 0
        if call.ask.catch_up:
            token_s = kit.costs.read_s(kit.chunk_tokens, call.work.position) / kit.chunk_tokens
            catch_up_tokens = int(max(0.0, time_s - planned.reserved_s) / token_s) if token_s else call.work.room
        parts = kit.prompts.make(call.ask, planned, catch_up_tokens=catch_up_tokens)
        if call.ask.catch_up:
            call.work = replace(call.work, parts=tuple(count_tokens([part]) for part in parts))
            planned = self._planned(time_s)
        call.planned = planned
        call.reserved_end_s = now_s + planned.reserved_s
        self._parts = parts
        size = run_size(count_tokens(parts), kit.chunk_tokens)
        return list(chunks(parts, lambda: size))

    def _planned(self, time_s: float) -> Planned:
        return self._kit.planner.fit(self._call.work, time_s) or self._kit.planner.least(self._call.work)

    def _weigh(self, labels: Labels, chunk: Chunk) -> Iterator[None]:
        """Read the last chunk, and go on until nobody wants to know more."""
        call, model = self._call, self._kit.model
        paths = model.label_paths(labels.texts)
        logits = self._feed(chunk, logits=True, only=model.every_token)
        assert logits is not None
        self._weighing = model.weighing(self._kit.fork, logits, labels, paths)
        for n_tokens in call.work.beside:
            yield
            with self._reading(n_tokens, logits=True):
                self._weighing.step()

    def _encode(self, chunk: Chunk) -> Iterator[None]:
        if isinstance(chunk, Rows) and chunk.image.embedding is None:
            with self._timed("image_s"), self._kit.costs.image(chunk.image.n_tokens):
                encode(self._kit.model, chunk.image)
            self._kit.counters.add("images_encoded")
            yield

    def _feed(self, chunk: Chunk, *, logits: bool = False, only: Ints | None = None) -> Floats | None:
        n_tokens = count_tokens([chunk])
        with self._reading(n_tokens, logits=logits):
            found = feed(self._kit.model, self._kit.fork, chunk, logits=logits, only=only)
        self._call.meter.prompt_tokens += n_tokens
        if isinstance(chunk, Rows):
            self._call.meter.image_tokens += n_tokens
        return found

    def _step(self, generation: Generation) -> None:
        runs_left, plan = self._runs_left(), self._plan
        if generation.thinking and (runs_left <= plan.answer_tokens or generation.n_tokens >= plan.thinking_tokens):
            generation.end_thought()
            runs_left = self._runs_left()  # the answer's first tokens may go on to its own deadline
        generation.haste = max(0.0, 1 - (runs_left - 1) / HASTE_TOKENS)
        guess = self._kit.drafting and runs_left > GUESS_TOKENS
        n_before, n_unread = generation.n_tokens, len(generation.unread)
        last = self._free_text and n_before > 0 and runs_left < self._more_runs()
        with self._timed("decode_s"), self._measured(generation, guess):
            said = generation.conclude() if last else generation.step(guess=guess)
        meter = self._call.meter
        meter.runs += n_before > 0
        meter.run_tokens += n_unread
        meter.generation_tokens, meter.thinking_tokens = generation.n_tokens, generation.n_thinking_tokens
        self._say(said)
        self._keep(generation)

    def _keep(self, generation: Generation) -> None:
        """Time for the sentence that is being said, and none behind it."""
        self._call.reserved_end_s = self._kit.clock()
        if self._whole:
            self._has_sentence(generation)
        elif left := self._call.reserved_left():
            self._call.reserved_end_s += (left - 1) * self._run_s() + self._run_s(slow=True)

    def _has_sentence(self, generation: Generation) -> None:
        """All that was said is whole, unless an ellipsis makes it so."""
        if generation.finish_reason is FinishReason.BUDGET:
            return
        meter = self._call.meter
        if not meter.whole_tokens:
            self._kit.lengths.learn_sentence(meter.answer_tokens, whole=True)
        meter.whole_tokens = meter.answer_tokens

    def _more_runs(self) -> int:
        """With fewer, one token is all that there is time for: no sentence is begun that others would cut in two."""
        if not self._whole:
            return 2
        for_others = self._kit.ends_s(self._call) < self._call.ask.deadline_s
        return max(MORE_TOKENS, self._plan.reserved_tokens) if for_others else MORE_TOKENS

    @property
    def _whole(self) -> bool:
        """Something was said in words, and nothing half."""
        return self._free_text and self._sentences.whole

    def _measured(self, generation: Generation, guess: bool) -> AbstractContextManager[None]:
        """Around a run of the model; the first token is drawn without one, and guesses are no usual runs."""
        n_unread, position, costs = len(generation.unread), generation.state.position, self._kit.costs
        if not self._free_text and n_unread:
            return costs.form(n_unread, position)
        return costs.step(position) if n_unread == 1 and not guess else nullcontext()

    def _said(self, prompt: list[Chunk]) -> Iterator[int]:
        """Tokens that the answer may quote; what a session has read long ago is not among them."""
        if self._session is not None or self._call.ask.use_context:
            yield from self._kit.prompts.context.said()
        for chunk in prompt:
            if not isinstance(chunk, Rows):
                yield from chunk

    def _fork(self) -> None:
        with self._timed("prefill_s"), self._kit.costs.fork():
            self._kit.prompts.parent(self._call.ask).lend_to(self._kit.fork)
        self._call.meter.context_tokens = self._kit.fork.position

    def _say(self, said: Said) -> None:
        assert self._generation is not None
        now_s = self._kit.clock()
        self._call.speak(said.thought, now_s, thought=True)
        near_end = self._free_text and self._runs_left() <= SENTENCE_TOKENS
        text = self._sentences.push(said.answer, near_end=near_end)
        self._call.speak(text, now_s, ending=self._ending)

    @property
    def _ending(self) -> str:
        """What makes the answer whole, were it cut off here; what is held back is not said then."""
        assert self._generation is not None
        return "" if self._sentences.holding else self._generation.ending

    @contextmanager
    def _reading(self, n_tokens: int, *, logits: bool = False) -> Iterator[None]:
        """Around a run that reads so many tokens into the fork."""
        with self._timed("prefill_s"), self._kit.costs.read(n_tokens, self._kit.fork.position, logits=logits):
            yield

    @contextmanager
    def _timed(self, name: Literal["image_s", "prefill_s", "decode_s"]) -> Iterator[None]:
        """Add what the block takes to a part of the call's time."""
        meter, began_s = self._call.meter, self._kit.clock()
        meter.unit = Unit(name.removesuffix("_s"), began_s)
        yield
        setattr(meter, name, getattr(meter, name) + self._kit.clock() - began_s)
