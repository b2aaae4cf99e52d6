"""Conversations that seldom occur, and that some chat templates write in a way of their own.

Where a template does, its pieces do not say how, and such a conversation is refused (`ChatTemplate.refused`). Knows
roles and texts, and nothing of pieces.
"""

from collections.abc import Iterator, Sequence
from typing import Any

_NAMES = {"system": "a system message", "user": "a question", "assistant": "an answer"}
_EMPTY = {"system": "an empty system message", "user": "an empty question", "assistant": "an empty answer"}
_BLANKS = {role: f"white space around {name}" for role, name in _NAMES.items()}
_TWO = {"user": "two questions in a row", "assistant": "two answers in a row"}
_THOUGHT = "thinking in an earlier answer"
_LAST_ANSWER = "an answer at the end"
ODDITIES = (*_TWO.values(), *_EMPTY.values(), _THOUGHT, *_BLANKS.values(), _LAST_ANSWER)
"""All of them, the one to do without first."""


def oddities(roles: Sequence[str], contents: Sequence[Sequence[Any]]) -> Iterator[tuple[str, int]]:
    """What is odd about a conversation, and in which of its messages.

    contents: of each message its texts, and something else for each of its images; neighbouring texts are joined.
    """
    for i, (role, content) in enumerate(zip(roles, contents, strict=True)):
        if not any(not isinstance(part, str) or part.strip() for part in content):
            yield _EMPTY[role], i
        elif any(isinstance(part, str) and part != part.strip() for part in (content[0], content[-1])):
            yield _BLANKS[role], i
        if i and role == roles[i - 1] and role in _TWO:
            yield _TWO[role], i
        if role == "assistant" and any(isinstance(part, str) and "</think>" in part for part in content):
            yield _THOUGHT, i
    if roles[-1] == "assistant":
        yield _LAST_ANSWER, len(roles) - 1
