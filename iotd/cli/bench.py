"""What a package costs on this machine."""

import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from iotd.cli.options import JSON, THREADS
from iotd.cli.show import plain

if TYPE_CHECKING:
    from iotd.ops.bench import Figure


class DefaultGroup(click.Group):
    """Commands of which one may be left out: what is none of their names is its first argument."""

    default = "speed"

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            args = [self.default, *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = [self.default, *args]
        return super().parse_args(ctx, args)


REPEAT = click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Runs of each figure.")
PLOT = click.option(
    "--plot",
    type=click.File("w", encoding="utf-8", lazy=False),
    metavar="FILE.svg",
    help="Draw the figures, too.",
)


@click.group(cls=DefaultGroup)
def bench() -> None:
    """Measure a model package on this machine. `iotd bench PACKAGE` is `iotd bench speed PACKAGE`."""


@bench.command()
@click.argument("package", type=click.Path(path_type=Path))
@THREADS
@REPEAT
@click.option(
    "--vs",
    "peers",
    metavar="[NAME=]PEER",
    multiple=True,
    help="Another engine on a model of the same shape, measured in turn: the URL of a server of llama.cpp or its kin, "
    "a .gguf file (needs llama-cpp-python), or a folder of onnxruntime-genai (needs that). Repeatable.",
)
@PLOT
@JSON
def speed(
    package: Path, threads: int, repeat: int, peers: tuple[str, ...], plot: IO[str] | None, as_json: bool
) -> None:
    """Load, prefill, decode, image encoding, memory; energy, where the machine measures it.

    Peers read and write as many tokens, in turn. Files and folders are opened in a process each, with as many threads;
    a server has its own.
    """
    from iotd.ops import bench as measure
    from iotd.ops.peers import opened

    with opened(peers, threads=threads, capacity=measure.PEER_CAPACITY) as others:
        figures = measure.run(package, threads=threads, repeat=repeat, peers=others)
        _tell_figures(figures, threads, repeat, plot, as_json)


@bench.command()
@click.argument("package", type=click.Path(path_type=Path))
@click.option(
    "--length",
    "lengths",
    type=click.IntRange(50, 2000),
    multiple=True,
    default=(100, 2000),
    show_default=True,
    help="Tokens of context, ascending; repeatable.",
)
@THREADS
@REPEAT
@click.option(
    "--vs",
    "peers",
    metavar="[NAME=]URL",
    multiple=True,
    help="A server of llama.cpp or its kin on a model of the same shape, asked in turn. Repeatable.",
)
@PLOT
@JSON
def context(
    package: Path,
    lengths: tuple[int, ...],
    threads: int,
    repeat: int,
    peers: tuple[str, ...],
    plot: IO[str] | None,
    as_json: bool,
) -> None:
    """How soon an answer to a new question of 20 tokens begins over the warm context, and what a fork costs."""
    from iotd.ops import bench_context
    from iotd.ops.peers import servers

    figures = bench_context.run(package, threads=threads, repeat=repeat, lengths=lengths, peers=servers(peers))
    _tell_figures(figures, threads, repeat, plot, as_json)


@bench.command()
@click.argument("package", type=click.Path(path_type=Path))
@THREADS
@click.option("--least", type=click.FloatRange(0, 100), default=1.0, show_default=True, help="Percent worth a line.")
@JSON
def profile(package: Path, threads: int, least: float, as_json: bool) -> None:
    """Which operators reading and decoding spend their time in."""
    from iotd.ops import bench_profile
    from iotd.ops.bench import machine

    if not as_json:
        click.echo(f"{machine()}; {threads} threads\n{'':<14}{'operator':<34}{'nodes':>6}{'ms a run':>10}{'part':>8}")
    for share in bench_profile.run(package, threads=threads):
        if 100 * share.part < least:
            continue
        if as_json:
            click.echo(json.dumps(plain(share)))
        else:
            click.echo(f"{share.what:<14}{share.operator:<34}{share.nodes:>6}{share.mean_ms:>10.2f}{share.part:>8.1%}")


def _tell_figures(figures: "Iterable[Figure]", threads: int, repeat: int, plot: IO[str] | None, as_json: bool) -> None:
    from iotd.ops.bench import machine

    head = f"{machine()}; {threads} threads; medians of {repeat} (lowest to highest)"
    if not as_json:
        click.echo(head)
    told = []
    for figure in figures:
        told.append(figure)
        if as_json:
            click.echo(json.dumps({**plain(figure), "threads": threads, "repeat": repeat}))
        else:
            spread = f"  ({figure.lowest:,.2f} to {figure.highest:,.2f})" if figure.lowest < figure.highest else ""
            click.echo(f"{figure.name:<40}{figure.median:>10,.2f} {figure.unit}{spread}")
    if plot:
        from iotd.ops.plot import svg

        plot.write(svg(told, f"{head}\niotd {shlex.join(sys.argv[1:])}"))
