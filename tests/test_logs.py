"""A log line is one line, says when, how grave and who, and carries its facts as fields."""

import json
import logging
import re
import sys
from collections.abc import Iterator

import pytest

from iotd.config import LogConfig
from iotd.ops.logs import JsonFormatter, PlainFormatter, setup


@pytest.fixture
def loggers() -> Iterator[tuple[logging.Logger, logging.Logger]]:
    """iotd's and a library's; everything is put back."""
    root, own = logging.getLogger(), logging.getLogger("iotd")
    before = root.handlers[:], root.level, own.level
    yield own, logging.getLogger("asyncio")
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    own.setLevel(before[2])


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("iotd.app", logging.WARNING, __file__, 1, message, args, None)
    vars(made).update(extra)
    return made


def test_a_json_line_holds_the_message_and_its_facts() -> None:
    fields = json.loads(JsonFormatter().format(record("%s is up", "iotd", grpc="127.0.0.1:1", window=128)))
    assert fields.pop("time") > 0
    assert fields == {
        "level": "warning",
        "logger": "iotd.app",
        "message": "iotd is up",
        "grpc": "127.0.0.1:1",
        "window": 128,
    }


def test_a_json_line_is_one_line_even_with_a_trace() -> None:
    made = record("failed\nbadly")
    try:
        raise ValueError("odd\nvalue")
    except ValueError:
        made.exc_info = sys.exc_info()
    line = JsonFormatter().format(made)
    assert "\n" not in line
    assert "ValueError: odd" in json.loads(line)["trace"]


def test_a_plain_line_shows_its_facts() -> None:
    line = PlainFormatter().format(record("ready", grpc="127.0.0.1:1"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d warning iotd.app: ready grpc=127.0.0.1:1", line)


def test_under_journald_the_priority_stands_in_front_and_the_time_is_the_journals() -> None:
    assert PlainFormatter(journal=True).format(record("slow")) == "<4>iotd.app: slow"


@pytest.mark.parametrize(("level", "theirs"), [("debug", "WARNING"), ("warning", "WARNING"), ("error", "ERROR")])
def test_the_level_is_iotds_own_and_libraries_stay_quiet(
    loggers: tuple[logging.Logger, logging.Logger], level: str, theirs: str
) -> None:
    own, library = loggers
    setup(LogConfig(level=level))  # type: ignore[arg-type] # one of the literals
    assert logging.getLevelName(own.getEffectiveLevel()) == level.upper()
    assert logging.getLevelName(library.getEffectiveLevel()) == theirs
