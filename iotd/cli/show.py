"""How commands show what they do and what they got, on a terminal and in a pipe."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click


@contextmanager
def progress(what: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; called with the parts of `total` that were just done."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda n: progress.advance(task, n)
        progress.update(task, completed=total)


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Imports that only an extra brings."""
    try:
        yield
    except ModuleNotFoundError as e:
        raise click.ClickException(f"{e.name} is not installed: pip install 'iotd[{name}]'") from e


def visible(text: str, *, err: bool = False) -> str:
    """On a terminal, without the control characters that could steer it. err: for what goes to stderr."""
    stream = sys.stderr if err else sys.stdout
    return "".join(c for c in text if c.isprintable() or c in "\n\t") if stream.isatty() else text


def plain(data: Any) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(data, dict_factory=lambda pairs: {key: getattr(value, "value", value) for key, value in pairs})
