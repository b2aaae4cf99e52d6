"""Sets up logging: one line a record on standard error, plain or JSON. Knows nothing of who logs."""

import json
import logging
import os
import time

from iotd.config import LogConfig

_PRIORITY = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}
"""syslog's levels, by which journald sorts lines that begin with `<N>` (sd-daemon(3))."""

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def setup(config: LogConfig) -> None:
    """Replace the root logger's handlers; may be called again to change level and format.

    The level is that of iotd's own loggers: the libraries below it speak from warning up.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if config.format == "json" else PlainFormatter("JOURNAL_STREAM" in os.environ))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[config.level.upper()]))
    logging.getLogger("iotd").setLevel(config.level.upper())


class PlainFormatter(logging.Formatter):
    """`2026-01-31T14:03:05 info iotd.app: text key=value`; under journald its priority instead of the time."""

    def __init__(self, journal: bool = False) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """Format one record; a trace follows on lines of its own."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.created))
        head = f"<{_PRIORITY.get(record.levelname, 6)}>" if self._journal else f"{stamp} {record.levelname.lower()} "
        tail = "".join(f" {key}={value}" for key, value in _extra(record).items())
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return f"{head}{record.name}: {record.getMessage()}{tail}{trace}"


class JsonFormatter(logging.Formatter):
    """One object a line: `time` (Unix seconds), `level`, `logger`, `message`, then what `extra` brought."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record; a trace is the field `trace`."""
        fields = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            fields["trace"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str, ensure_ascii=False)


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _OWN}
