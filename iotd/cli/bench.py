"""What a package costs on this machine."""

import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from iotd.cli.options import FILE, HEAD, JSON, THREADS
from iotd.cli.show import plain, progress

if TYPE_CHECKING:
    from iotd.model.head import HeadKind
    from iotd.ops.bench import Figure


class DefaultGroup(click.Group):
    """Commands of which one may be left out: what is none of their names is its first argument. --NAME is NAME, too."""

    default = "speed"

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            args = [self.default, *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if flags := [arg for arg in args if arg.startswith("--") and arg[2:] in self.commands]:
            args = [flags[0][2:], *(arg for arg in args if arg not in flags)]
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
@HEAD
@PLOT
@JSON
def speed(
    package: Path,
    threads: int,
    repeat: int,
    peers: tuple[str, ...],
    head: "HeadKind",
    plot: IO[str] | None,
    as_json: bool,
) -> None:
    """Load, prefill, decode, image encoding, memory; energy, where the machine measures it.

    Peers read and write as many tokens, in turn. Files and folders are opened in a process each, with as many threads;
    a server has its own.
    """
    from iotd.ops import bench as measure
    from iotd.ops.peers import opened

    with opened(peers, threads=threads, capacity=measure.PEER_CAPACITY) as others:
        figures = measure.run(package, threads=threads, repeat=repeat, head=head, peers=others)
        _tell_figures(figures, threads, repeat, plot, as_json)


SERVERS = click.option(
    "--vs",
    "peers",
    metavar="[NAME=]URL",
    multiple=True,
    help="A server of llama.cpp or its kin on a model of the same shape, asked in turn. Repeatable.",
)


@bench.command()
@click.argument("package", type=click.Path(path_type=Path))
@THREADS
@REPEAT
@SERVERS
@PLOT
@JSON
def answers(
    package: Path, threads: int, repeat: int, peers: tuple[str, ...], plot: IO[str] | None, as_json: bool
) -> None:
    """How fast answers are that quote their context, with guesses and without, or that keep to a JSON schema."""
    from iotd.ops import bench_answers
    from iotd.ops.peers import servers

    figures = bench_answers.run(package, threads=threads, repeat=repeat, peers=servers(peers))
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
@SERVERS
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
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True, help="Turns of each setting.")
@click.option("--write", type=FILE, metavar="CONFIG", help="Put the choice into this YAML file; all else in it stays.")
@JSON
def tune(package: Path, repeat: int, write: Path | None, as_json: bool) -> None:
    """Choose model.threads, model.spinning and model.affinity for this machine; `iotd bench --tune` is the same.

    Of the settings that decode within 5 % of the fastest it takes one that leaves a core free, that does not spin, that
    keeps no thread to a core: in this order, each where there is one. Among what is left the fastest prefill decides.
    """
    from dataclasses import asdict

    from iotd import config, config_file
    from iotd.ops import board
    from iotd.ops.bench import machine
    from iotd.ops.bench_tune import choose, run, settings

    if write:
        config.load(write, {})  # an error in it is told now and not after minutes
    cores = board.cores()
    with progress("trying", repeat * len(settings(cores)), as_json) as advance:
        tried = run(package, repeat=repeat, advance=advance)
    chosen = choose(tried, cores)
    if write:
        config_file.write(write, "model", asdict(chosen))
    if not as_json:
        click.echo(f"{machine()}; medians of {repeat}, tokens/s")
        click.echo(f"{'threads':>7}{'spinning':>10}{'affinity':>10}{'decode':>9}{'prefill':>9}")
    for setting, speeds in ((one.setting, one.speeds) for one in tried):
        if as_json:
            click.echo(json.dumps(plain(setting) | plain(speeds) | {"chosen": setting == chosen}))
        else:
            keys = f"{setting.threads:>7}{_yes(setting.spinning):>10}{_yes(setting.affinity):>10}"
            mark = "  chosen" if setting == chosen else ""
            click.echo(f"{keys}{speeds.decode:>9.2f}{speeds.prefill:>9.2f}{mark}")
    if write and not as_json:
        click.echo(f"{write}: written")


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


def _yes(value: bool) -> str:
    return "yes" if value else "no"


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
