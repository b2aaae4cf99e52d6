"""How commands show what they do and what they got, on a terminal and in a pipe."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from iotd.model.package import Quality


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


def quality_lines(found: "Sequence[Quality]") -> Iterator[str]:
    """A table of how near a package is to its original, by kind of text; nothing of nothing."""
    if not found:
        return
    yield f"{'text':<12}{'tokens':>8}{'KLD':>9}{'median':>9}{'99 %':>8}{'same':>8}{'perplexity':>12}{'of float32':>12}"
    for one in found:
        yield (
            f"{one.kind:<12}{one.n_tokens:>8}{one.kld_mean:>9.4f}{one.kld_median:>9.4f}{one.kld_p99:>8.3f}"
            f"{one.top1:>8.1%}{one.ppl:>12.2f}{one.ppl_float:>12.2f}"
        )


def visible(text: str, *, err: bool = False) -> str:
    """On a terminal, without the control characters that could steer it. err: for what goes to stderr."""
    stream = sys.stderr if err else sys.stdout
    return "".join(c for c in text if c.isprintable() or c in "\n\t") if stream.isatty() else text


def plain(data: Any) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(data, dict_factory=lambda pairs: {key: getattr(value, "value", value) for key, value in pairs})
