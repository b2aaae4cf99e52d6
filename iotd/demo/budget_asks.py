"""One ask of a measurement of budgets: sent, followed to its end, judged afterwards. Knows no load."""

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Callable

from iotd.client import AskOptions, AsyncAnswerStream, AsyncClient
from iotd.demo.arrivals import ROOM_SCHEMA, SENTENCE_REGEX, YES_NO, Arrival
from iotd.demo.budget_score import Again, Asked, has_sentence
from iotd.demo.questions import Question
from iotd.errors import DeadlineExceeded, IotdError

AMPLE_S = 60.0
"""A budget that is not felt."""
CUT_TOKENS = 16
"""Of an answer in words, where a fixed cut stands in a plan's place."""


async def ask(client: AsyncClient, arrival: Arrival, question: str, *, due_s: float, cut: bool = False) -> Asked:
    """Ask now, and see what comes of it. due_s: when that was to be, on the monotonic clock.

    cut: an answer in words is cut at a fixed number of tokens; the client alone knows the budget, and hangs up.
    """
    asked = Asked(arrival.kind.name, arrival.kind.form, question, arrival.budget_s, arrival.max_tokens, arrival.at_s)
    options = _options(arrival, AMPLE_S if cut else arrival.budget_s)
    if cut and asked.form == "free":
        options["max_tokens"] = min(CUT_TOKENS, arrival.max_tokens)
    sent_s = time.monotonic()
    asked.lag_s = sent_s - due_s
    try:
        async with asyncio.timeout(arrival.budget_s if cut else None):
            await _follow(client.ask(question, **options), asked, sent_s)
    except IotdError as error:
        asked.error, asked.needed_s = error.code, getattr(error, "needed_s", None)
    except TimeoutError:
        asked.error = DeadlineExceeded.code
    if asked.error:
        asked.end_s = time.monotonic() - sent_s
    if asked.refused and arrival.again:
        asked.again = await _again(client, arrival, question, ends_s=sent_s + arrival.budget_s)
    return asked


def judge(asked: Asked, truth: Question | None) -> Asked:
    """Fill in whether the answer is right and valid. Takes some time, which nothing should be measured in."""
    answer = asked.text.strip()
    if truth is not None:
        asked.right = not asked.error and truth.right(answer)
    if asked.form != "free" and not asked.error:
        asked.valid = _VALID[asked.form](answer)
    return asked


def _options(arrival: Arrival, budget_s: float) -> AskOptions:
    return {"budget_s": budget_s, "max_tokens": arrival.max_tokens, **arrival.kind.options}


async def _follow(stream: AsyncAnswerStream, asked: Asked, sent_s: float) -> None:
    """Fill in what comes of it, as far as it comes. Raises IotdError where it fails."""
    try:
        async for _ in stream:
            if asked.first_s is None:
                asked.first_s = time.monotonic() - sent_s
        answer = stream.result
        asked.end_s = stream.done_s - sent_s
        asked.text, asked.finish_reason = answer.text, answer.finish_reason
        asked.usage, asked.timings = answer.usage, answer.timings
    finally:
        if accepted := stream.accepted:
            asked.accepted_s = stream.accepted_s - sent_s
            asked.request_id, asked.queue_position = accepted.request_id, accepted.queue_position
            asked.plan = accepted.plan


async def _again(client: AsyncClient, arrival: Arrival, question: str, *, ends_s: float) -> Again:
    """Send a refused ask once more, with time enough, and see what has come of it by its first deadline."""
    found, text = Again(), ""
    with contextlib.suppress(IotdError, TimeoutError):
        async with asyncio.timeout(ends_s - time.monotonic()):
            async for piece in client.ask(question, **_options(arrival, AMPLE_S)):
                found.pieces += 1
                text += piece
            found.whole = True
    found.sentence = has_sentence(text)
    return found


def _follows_schema(answer: str) -> bool:
    from jsonschema import Draft202012Validator

    try:
        return bool(Draft202012Validator(ROOM_SCHEMA).is_valid(json.loads(answer)))
    except ValueError:
        return False


_VALID: dict[str, Callable[[str], bool]] = {
    "choices": lambda answer: answer in YES_NO,
    "json_schema": _follows_schema,
    "regex": lambda answer: re.fullmatch(SENTENCE_REGEX, answer) is not None,
}
