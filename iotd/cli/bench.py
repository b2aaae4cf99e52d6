"""What a package costs on this machine."""

import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from iotd.cli.options import DURATION, FILE, HEAD, JSON, THREADS, Number
from iotd.cli.show import extra, plain, progress, quality_lines

if TYPE_CHECKING:
    from iotd.model.head import HeadChoice
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
        flags = [arg for arg in args if arg.startswith("--") and arg[2:] in self.commands]
        if flags and args[0] not in self.commands:
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
    head: "HeadChoice",
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


@bench.command()
@click.argument("package", type=click.Path(path_type=Path))
@click.option(
    "--reference",
    required=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="CHECKPOINT|PACKAGE",
    help="What the package was made of: the checkpoint's folder, or a package of it with --recipe fp32.",
)
@click.option("--on", type=FILE, help="Texts to measure on; a line `## KIND` begins a kind. Held-back ones otherwise.")
@click.option("--tokens", "n_tokens", type=click.IntRange(512), default=4096, show_default=True, help="Without --on.")
@THREADS
@PLOT
@JSON
def quality(
    package: Path,
    reference: Path,
    on: Path | None,
    n_tokens: int,
    threads: int,
    plot: IO[str] | None,
    as_json: bool,
) -> None:
    """How far a package is from its original, token by token, and which of its matrices cost most.

    KLD is the Kullback-Leibler divergence of the next token's distribution from the original's, in nats; "same", how
    often the likeliest token is the same. With the checkpoint as reference: the noise that each matrix adds, by layer.
    """
    with extra("convert"):
        from iotd.ops import bench_quality as measure
    from iotd.model import Model
    from iotd.model.package import MANIFEST
    from iotd.ops.bench import machine

    model = Model.open(package, threads=threads)
    texts = measure.texts_of(model, on, n_tokens)
    packaged = (reference / MANIFEST).exists()
    if packaged:
        expected = measure.of_package(Model.open(reference, threads=threads), texts)
    else:
        expected = measure.of_checkpoint(reference, texts)
    with progress("measuring", sum(len(text.ids) for text in texts), as_json) as advance:
        found = measure.measure(model, texts, expected, advance)
    costs = [] if packaged else [*measure.costs(package, reference, texts)]
    if as_json:
        from msgspec import to_builtins

        told = {"texts": [to_builtins(one) for one in found], "matrices": [plain(cost) for cost in costs]}
        click.echo(json.dumps(told))
    else:
        click.echo("\n".join(quality_lines(found)))
        for line in measure.cost_lines(costs):
            click.echo(line)
    if plot:
        from iotd.ops.plot import svg

        caption = f"{machine()}\niotd {shlex.join(sys.argv[1:])}"
        plot.write(svg([*measure.figures(found, costs)], caption, axis="layer"))


class Budgets(click.ParamType[tuple[float, float]]):
    """`200ms:10s`: the shortest and the longest. Gives seconds."""

    name = "budgets"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        """Parse; fails with a usage error."""
        low, _, high = value.partition(":")
        low_s, high_s = (DURATION.convert(part, param, ctx) for part in (low, high))
        if low_s >= high_s:
            self.fail(
                f"{value!r} is no range: write the shortest budget before the longest, as in 200ms:10s", param, ctx
            )
        return low_s, high_s


@bench.command()
@click.argument("package", type=click.Path(path_type=Path))
@click.option(
    "--load",
    "loads",
    type=Number(0, 100, min_open=True),
    multiple=True,
    default=(0.4, 0.8, 1.5),
    show_default=True,
    help="Work that arrives, as a part of what can be done. Repeatable.",
)
@click.option("--asks", type=click.IntRange(1), default=200, show_default=True, help="Of each load.")
@click.option(
    "--budgets",
    "budgets_s",
    type=Budgets(),
    metavar="LOW:HIGH",
    help="Drawn log-uniformly from such a range as 200ms:10s. Left out: 0.2 to 10 s, or 5 to 500 decode steps where a "
    "step takes less than 10 ms.",
)
@click.option("--rate", "rate_hz", type=Number(1, 1000), default=10.0, show_default=True, help="Readings a second.")
@click.option("--frames", "frame_hz", type=Number(0.1, 100), default=0.5, show_default=True, help="Frames a second.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the home, the asks and their times.")
@click.option(
    "--check-refused",
    type=Number(0, 1),
    default=0.2,
    show_default=True,
    help="The share of refused asks that are sent again with time enough: what would have come by their deadline?",
)
@click.option("--baseline", is_flag=True, help="Then do each load again without budgets, answers cut at 16 tokens.")
@click.option("--hog", is_flag=True, help="Keep all cores busy in the middle third of each load; needs stress-ng.")
@click.option("--answers", type=click.File("w", encoding="utf-8"), help="Write each ask and its end, as JSON lines.")
@THREADS
@PLOT
@JSON
def budget(
    package: Path,
    loads: tuple[float, ...],
    answers: IO[str] | None,
    plot: IO[str] | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """How well budgets are kept, at a client over gRPC, while a simulated home is read.

    Starts a broker, the home and a daemon on PACKAGE, and asks questions of several kinds with budgets from very short
    to ample. They arrive at random times, whether or not earlier ones have been answered. With the demo's model it
    tells how many answers are right, too. The environment reaches the daemon: IOTD_ASK__QUEUE=4 and the like.
    """
    with extra("test"):
        import jsonschema  # noqa: F401 - what judges forms is missed before anything has been measured

    from iotd.cli.budget_table import opening, table
    from iotd.demo.bench_budget import BudgetBench, Settings
    from iotd.demo.child import signals_interrupt
    from iotd.ops.bench import machine

    with signals_interrupt(), BudgetBench(package, Settings(**settings)) as measure:
        found = measure.calibrate()
        head = f"{machine()}; {settings['threads']} threads"
        if not as_json:
            click.echo("\n".join([head, *opening(found)]))
        scores = []
        for load in loads:
            if sys.stderr.isatty() and not as_json:
                click.echo(f"load {load:g}: about {measure.duration_s(load):.0f} s", err=True)
            score, asked = measure.load(load)
            scores.append(score)
            for ask in asked if answers else ():
                click.echo(json.dumps({"load": load, **plain(ask)}, ensure_ascii=False), file=answers)
            click.echo(json.dumps(plain(found) | plain(score)) if as_json else "\n".join(["", *table(score)]))
    if plot:
        from iotd.cli.budget_table import AXIS, figures
        from iotd.ops.plot import svg

        told = [figure for score in scores for figure in figures(score)]
        plot.write(svg(told, f"{head}\niotd {shlex.join(sys.argv[1:])}", axis=AXIS))


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
