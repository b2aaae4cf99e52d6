"""What `iotd demo` shows: a live display on a terminal, plain lines in a pipe, JSON lines for scripts.

Knows nothing of where the figures come from.
"""

import json
import sys
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Protocol, Self

from iotd.events import ServerStatus


@dataclass(frozen=True, slots=True)
class Asked:
    """One question of the demo, and how it went. `error` is empty where it was answered."""

    kind: str
    question: str
    truth: str
    """A right answer."""
    budget_s: float
    text: str
    right: bool
    finish_reason: str
    first_token_s: float
    total_s: float
    """Measured by the asker, from the call to the last event."""
    in_time: bool
    error: str = ""


class Screen(Protocol):
    """Where the demo tells its story; a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def say(self, text: str, **facts: object) -> None:
        """One line; `facts` is the same for a script."""

    def asked(self, asked: Asked) -> None:
        """A question has ended."""

    def status(self, status: ServerStatus) -> None:
        """What the daemon does now."""


def open_screen(as_json: bool) -> Screen:
    """The one that suits standard output."""
    if as_json:
        return JsonScreen()
    return LiveScreen() if sys.stdout.isatty() else PlainScreen()


class _Stateless:
    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class JsonScreen(_Stateless):
    """One object a line, named by its `event`."""

    def say(self, text: str, **facts: object) -> None:
        self._write("message", {"text": text, **facts})

    def asked(self, asked: Asked) -> None:
        self._write("answer", asdict(asked))

    def status(self, status: ServerStatus) -> None:
        self._write("status", figures(status))

    def _write(self, event: str, facts: dict[str, object]) -> None:
        sys.stdout.write(json.dumps({"event": event, **facts}, ensure_ascii=False) + "\n")
        sys.stdout.flush()


class PlainScreen(_Stateless):
    """Lines of text; the status only when it has moved on by a good deal."""

    STATUS_EVERY = 10

    def __init__(self) -> None:
        self._n = 0

    def say(self, text: str, **facts: object) -> None:
        self._write(text)

    def asked(self, asked: Asked) -> None:
        self._write("\n".join((question_line(asked), answer_line(asked), truth_line(asked), timing_line(asked))))

    def status(self, status: ServerStatus) -> None:
        self._n += 1
        if self._n % self.STATUS_EVERY == 1:
            self._write(status_line(status))

    def _write(self, text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


class LiveScreen:
    """Answers scroll by above one line that is kept up to date."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        self._text = Text
        self._console = Console(highlight=False)
        self._live: AbstractContextManager[object] = Live(
            Text("starting", style="dim"), console=self._console, refresh_per_second=4, transient=True
        )

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def say(self, text: str, **facts: object) -> None:
        self._console.print(self._text(text))

    def asked(self, asked: Asked) -> None:
        for line, style in (
            (question_line(asked), "bold"),
            (answer_line(asked), "green" if asked.right else "red"),
            (truth_line(asked), "dim"),
            (timing_line(asked), "" if asked.in_time else "red"),
        ):
            self._console.print(self._text(line, style=style))

    def status(self, status: ServerStatus) -> None:
        self._live.update(self._text(status_line(status), style="cyan"))  # type: ignore[attr-defined] # rich's Live


def question_line(asked: Asked) -> str:
    return f"? {asked.question}"


def answer_line(asked: Asked) -> str:
    """The answer on one line, shortened; control characters shown as a dot, for a model may say any."""
    if asked.error:
        return _line("none", asked.error)
    text = "".join(c if c.isprintable() else "·" for c in asked.text)
    return _line("right" if asked.right else "WRONG", text if len(text) <= 100 else text[:99] + "…")


def truth_line(asked: Asked) -> str:
    return _line("truth", asked.truth)


def timing_line(asked: Asked) -> str:
    """First token and total against the budget."""
    verdict = "in time" if asked.in_time else "failed" if asked.error else "LATE"
    first = f"first token {asked.first_token_s * 1000:.0f} ms, " if asked.first_token_s else ""
    reason = f" ({asked.finish_reason})" if asked.finish_reason else ""
    return _line(verdict, f"{first}total {asked.total_s:.2f} s of {asked.budget_s:g} s{reason}")


def _line(label: str, text: str) -> str:
    return f"  {label:<8}{text}"


def figures(status: ServerStatus) -> dict[str, object]:
    """The figures that move."""
    engine, link = status.engine, status.link
    return {
        "messages": link.counters.get("messages", 0) if link else 0,
        "readings": engine.counters.get("readings", 0),
        "frames": engine.counters.get("frames", 0),
        "context_tokens": engine.context_tokens,
        "context_window": engine.context_window,
        "backlog": engine.backlog,
        "resident_mb": round(status.resident_nbytes / 1e6, 1),
        "uptime_s": round(status.uptime_s, 1),
    }


def status_line(status: ServerStatus) -> str:
    """The same on one line."""
    f = figures(status)
    return (
        f"messages {f['messages']}, readings {f['readings']}, frames {f['frames']} · "
        f"context {f['context_tokens']}/{f['context_window']} tokens · {f['resident_mb']} MB · {f['uptime_s']:.0f} s"
    )
