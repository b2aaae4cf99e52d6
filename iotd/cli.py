"""The command line: parses arguments, calls the parts, shows what they give. Everything heavy is imported on use."""

import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

import click

from iotd import __version__
from iotd.errors import InvalidInput, IotdError

if TYPE_CHECKING:
    from iotd.client import Answer
    from iotd.config import Config
    from iotd.demo.evaluate import Outcome
    from iotd.demo.respondents import DaemonRespondent, FreshDaemonRespondent, PackageRespondent
    from iotd.demo.simulate import Totals
    from iotd.model.package import Manifest
    from iotd.ops.bench import Figure
    from iotd.ops.peers import LlamaServer

INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""
DEFAULT_TARGET = "127.0.0.1:50551"
DEFAULT_CONFIG = Path("/etc/iotd/iotd.yaml")


class Duration(click.ParamType[float]):
    """`2s`, `500ms`, `1m30s`, or plain seconds; above zero. Gives seconds."""

    name = "duration"
    _UNITS: Mapping[str, float] = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse; fails with a usage error."""
        if isinstance(value, int | float):
            return float(value)
        parts = re.findall(r"(\d+(?:\.\d+)?)(ms|[smhd])", value) or re.findall(r"^(\d+(?:\.\d+)?)($)", value)
        if not parts or "".join(number + unit for number, unit in parts) != value:
            self.fail(f"{value!r} is no duration: write 2s, 500ms or 1m30s", param, ctx)
        seconds = sum(float(number) * self._UNITS.get(unit, 1.0) for number, unit in parts)
        if not 0 < seconds < math.inf:
            self.fail(f"{value!r} must be above zero and finite", param, ctx)
        return seconds


class Number(click.FloatRange):
    """A range without nan and inf, which click's own takes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse; fails with a usage error."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is no number", param, ctx)
        return number


DURATION = Duration()
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
CONFIG = click.option(
    "-c",
    "--config",
    type=click.Path(path_type=Path),
    help=f"YAML file; without it {DEFAULT_CONFIG}, or the defaults where there is none.",
)
TARGET = click.option(
    "--target", default=DEFAULT_TARGET, envvar="IOTD_TARGET", show_default=True, help="HOST:PORT of the daemon."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Write JSON, for scripts.")


def TLS(command: Callable[..., Any]) -> Callable[..., Any]:  # noqa: N802 - stands among options
    """The files of a client's TLS."""
    for option in (
        click.option("--key-file", type=FILE, help="Its key."),
        click.option("--cert-file", type=FILE, help="This client's certificate, for mutual TLS."),
        click.option("--ca-file", type=FILE, help="Authority of the daemon's certificate; turns TLS on."),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="iotd", message="%(prog)s %(version)s")
def commands() -> None:
    """A warm vision-language model for the sensors and cameras around a small board."""


@commands.command()
def version() -> None:
    """Print the version."""
    click.echo(f"iotd {__version__}")


@commands.command()
@CONFIG
def serve(config: Path | None) -> int:
    """Run the daemon: read sensors and cameras over MQTT, answer over gRPC.

    SIGTERM drains and stops, SIGHUP reloads the configuration, SIGUSR1 saves the context.
    """
    # Until the daemon listens for them: one that comes this early has nothing to act on, and must not end it.
    for number in (signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    from iotd import app

    return app.serve(lambda: _load(config))


@commands.command()
@CONFIG
@JSON
def check(config: Path | None, as_json: bool) -> int:
    """Say what would keep `serve` from working, and what it would do. Opens the model, and starts nothing."""
    from iotd.ops.preflight import Finding

    try:
        loaded = _load(config)
    except IotdError as e:
        unread = isinstance(e.__cause__, OSError)
        remedy = "name a file that is there and that this user can read" if unread else "correct these lines"
        findings = [Finding("config", False, str(e), remedy)]
    else:
        from iotd import app

        findings = [Finding("config", True, "no errors"), *app.check(loaded)]
    if as_json:
        click.echo(json.dumps({"ok": all(f.ok for f in findings), "findings": [_plain(f) for f in findings]}))
    else:
        for finding in findings:
            click.echo(_line(finding))
    return 0 if all(f.ok for f in findings) else 1


@commands.command()
@TARGET
@TLS
@click.option("--every", "every_s", type=DURATION, default=1.0, show_default=True, help="Between two looks.")
@click.option("--once", is_flag=True, help="Look once, and end.")
@JSON
def top(target: str, every_s: float, once: bool, as_json: bool, **files: Any) -> None:
    """Show live what the daemon is doing: context, queue, speeds, last answers, memory."""
    from iotd.client import Client
    from iotd.ops.top import lines

    with Client(target, **files) as client, _screen(as_json or once) as show:
        before = None
        while True:
            now = client.status()
            show(json.dumps(_plain(now)) if as_json else "\n".join(lines(now, before, time.time())))
            if once:
                return
            before = now
            time.sleep(every_s)


@contextmanager
def _screen(plain: bool) -> Iterator[Callable[[str], None]]:
    """Shows one text after another: in one place on a terminal, below each other elsewhere."""
    if plain or not sys.stdout.isatty():
        yield click.echo
        return
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False, screen=True) as live:
        yield lambda text: live.update(Text(text), refresh=True)


@commands.group()
def state() -> None:
    """The saved context, from which a restart goes on."""


@state.command()
@CONFIG
@JSON
def show(config: Path | None, as_json: bool) -> None:
    """Say what the snapshot holds that the configuration names."""
    from iotd.ops import snapshots

    path = _snapshot(config)
    found = snapshots.describe(path)
    if as_json:
        click.echo(json.dumps({"path": str(path)} | (_plain(found) if found else {})))
    elif found is None:
        click.echo(f"{path}: no snapshot; the next start begins empty")
    else:
        click.echo(f"{path}: {found.nbytes / 1e6:.1f} MB, saved {_moment(found.saved_s)}")
        click.echo(f"context: {found.tokens} of {found.window} tokens, model {found.model[:12]}")
        if found.events:
            spans = f"from {_moment(found.oldest_s)} to {_moment(found.newest_s)}"
            click.echo(f"events: {spans}; {found.events} kept for the next successor")


@state.command()
@CONFIG
def clear(config: Path | None) -> None:
    """Remove the snapshot: the next start begins empty. A daemon that runs saves again when it stops."""
    from iotd.ops import snapshots

    path = _snapshot(config)
    try:
        removed = snapshots.clear(path)
    except OSError as e:
        raise InvalidInput(f"{path} cannot be removed: {e.strerror}", field="snapshot.path") from e
    click.echo(f"{path}: {'removed' if removed else 'there was none'}")


@commands.command()
@click.argument("question")
@click.option("--image", "images", type=FILE, multiple=True, help="JPEG or PNG put before the question; repeatable.")
@click.option("--camera", help="Puts this camera's newest frame before the question.")
@click.option("--budget", type=DURATION, help="Time for the whole answer, such as 2s; the server's default otherwise.")
@TARGET
@TLS
@click.option("--no-context", is_flag=True, help="Ask the model alone, without the stream of readings.")
@click.option("--exact", is_flag=True, help="Put exact figures of the sensors it names before the question.")
@click.option("--sensor", "sensors", multiple=True, help="The same, of this label or pattern; repeatable.")
@click.option("--keep-session", is_flag=True, help="Keep where the answer ends; says by which name to go on.")
@click.option("--session", help="Go on from the answer that was kept under this name.")
@click.option("--catch-up", is_flag=True, help="With --session: read what has come since, before the question.")
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer, in tokens.")
@click.option("--temperature", type=Number(0), help="0 takes the most likely token each time.")
@click.option("--seed", type=click.IntRange(0), help="The same seed gives the same answer.")
@click.option("--thinking", is_flag=True, help="Let the model think first.")
@JSON
def ask(question: str, target: str, as_json: bool, **options: Any) -> None:
    """Ask the daemon one QUESTION; the answer streams to the terminal."""
    from iotd.client import Client

    files = {name: options.pop(name) for name in ("ca_file", "cert_file", "key_file")}
    options |= {
        "budget_s": options.pop("budget"),
        "use_context": not options.pop("no_context"),
        "exact_readings": options.pop("exact"),
        "thinking": options.pop("thinking") or None,
    }
    with Client(target, **files) as client, client.ask(question, **options) as answer:
        for piece in answer:
            click.echo(json.dumps({"delta": piece}) if as_json else _visible(piece), nl=as_json)
            sys.stdout.flush()
        if as_json:
            click.echo(json.dumps({"done": _plain(answer.done)}))
        else:
            click.echo()
            _tell_end(answer.result)


RECIPE = click.option(
    "--recipe", type=click.Choice(["int4", "int8", "fp32"]), default="int4", show_default=True, help="Of the weights."
)
NO_VISION = click.option("--no-vision", is_flag=True, help="Leave out the vision tower: text only.")


@commands.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="[CHECKPOINT] OUT")
@RECIPE
@NO_VISION
@click.option(
    "--random", "size", metavar="SIZE", help="Random weights of this size (0.8b, tiny) in CHECKPOINT's place."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random weights.")
@JSON
def convert(paths: tuple[Path, ...], recipe: str, no_vision: bool, size: str | None, seed: int, as_json: bool) -> None:
    """Turn a checkpoint into a model package.

    CHECKPOINT is a folder as save_pretrained of transformers writes it; OUT the package's folder, for `model.path`.
    """
    if len(paths) != (1 if size else 2):
        raise click.UsageError("give CHECKPOINT and OUT" if not size else "with --random give OUT alone")
    with _extra("convert"):
        from iotd.convert.checkpoint import Checkpoint
        from iotd.convert.convert import convert_checkpoint, convert_random
        from iotd.convert.random import N_PARAMETERS
    if size and size not in N_PARAMETERS:
        raise click.BadParameter(f"{size!r} is none of {', '.join(N_PARAMETERS)}", param_hint="--random")
    total = N_PARAMETERS[size] if size else Checkpoint(paths[0]).n_elements
    with _progress("converting", total, as_json) as advance:
        if size:
            made = convert_random(size, paths[0], recipe=recipe, vision=not no_vision, seed=seed, progress=advance)
        else:
            made = convert_checkpoint(paths[0], paths[1], recipe=recipe, vision=not no_vision, progress=advance)
    _tell_package(paths[-1], made, as_json)


@commands.command()
@click.argument("repo")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--revision", help="Branch, tag or commit; the newest otherwise.")
@RECIPE
@NO_VISION
@JSON
def pull(repo: str, out: Path, revision: str | None, recipe: str, no_vision: bool, as_json: bool) -> None:
    """Fetch a checkpoint from the model hub and convert it.

    REPO is its name there, such as Qwen/Qwen3.5-0.8B; OUT the package's folder, for `model.path`.
    """
    with _extra("convert"):
        from iotd.convert.checkpoint import Checkpoint
        from iotd.convert.convert import convert_checkpoint
        from iotd.convert.hub import fetch
    folder, source = fetch(repo, revision)
    with _progress("converting", Checkpoint(folder).n_elements, as_json) as advance:
        made = convert_checkpoint(folder, out, recipe=recipe, vision=not no_vision, source=source, progress=advance)
    _tell_package(out, made, as_json)


def _tell_package(path: Path, made: "Manifest", as_json: bool) -> None:
    nbytes = sum(entry.nbytes for entry in made.files.values())
    if as_json:
        click.echo(json.dumps({"path": str(path), "name": made.name, "recipe": made.recipe.name, "nbytes": nbytes}))
    else:
        click.echo(f"{path}: {made.name}, {made.recipe.name}, {nbytes / 1e6:,.1f} MB")


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


THREADS = click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="Compute threads.")
VS = click.option("--vs", metavar="URL", help="A llama.cpp server on a model of the same shape: measured in turn.")
REPEAT = click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Runs of each figure.")


@commands.group(cls=DefaultGroup)
def bench() -> None:
    """Measure a model package on this machine. `iotd bench PACKAGE` is `iotd bench speed PACKAGE`."""


@bench.command()
@click.argument("package", type=click.Path(path_type=Path))
@THREADS
@REPEAT
@VS
@JSON
def speed(package: Path, threads: int, repeat: int, vs: str | None, as_json: bool) -> None:
    """Load, prefill, decode, image encoding, memory."""
    from iotd.ops import bench as measure

    figures = measure.run(package, threads=threads, repeat=repeat, peer=_peer(vs))
    _tell_figures(figures, threads, repeat, as_json)


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
@VS
@JSON
def context(package: Path, lengths: tuple[int, ...], threads: int, repeat: int, vs: str | None, as_json: bool) -> None:
    """How soon an answer to a new question of 20 tokens begins over the warm context, and what a fork costs."""
    from iotd.ops import bench_context

    figures = bench_context.run(package, threads=threads, repeat=repeat, lengths=lengths, peer=_peer(vs))
    _tell_figures(figures, threads, repeat, as_json)


def _peer(url: str | None) -> "LlamaServer | None":
    from iotd.ops.peers import LlamaServer

    return LlamaServer(url) if url else None


def _tell_figures(figures: "Iterable[Figure]", threads: int, repeat: int, as_json: bool) -> None:
    from iotd.ops.bench import machine

    if not as_json:
        click.echo(f"{machine()}; {threads} threads; medians of {repeat} (lowest to highest)")
    for figure in figures:
        if as_json:
            click.echo(json.dumps({**_plain(figure), "threads": threads, "repeat": repeat}))
        else:
            spread = f"  ({figure.lowest:,.2f} to {figure.highest:,.2f})" if figure.lowest < figure.highest else ""
            click.echo(f"{figure.name:<28}{figure.median:>10,.2f} {figure.unit}{spread}")


@contextmanager
def _progress(what: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
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
def _extra(name: str) -> Iterator[None]:
    """Imports that only an extra brings."""
    try:
        yield
    except ModuleNotFoundError as e:
        raise click.ClickException(f"{e.name} is not installed: pip install 'iotd[{name}]'") from e


@commands.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="The broker.")
@click.option("--port", type=click.IntRange(1, 65535), default=1883, show_default=True)
@click.option("--username", default="", help="For the broker.")
@click.option("--password-file", type=FILE, help="File that holds its password.")
@click.option("--rate", type=Number(0, 10_000), default=2.0, show_default=True, help="Readings a second.")
@click.option("--frames", type=Number(0, 1000), default=0.2, show_default=True, help="Camera frames a second.")
@click.option("--speed", type=Number(0, 10_000, min_open=True), default=1.0, show_default=True, help="Of its clock.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same day.")
@click.option("--for", "for_s", type=DURATION, help="Stop after this long; otherwise at Ctrl-C.")
@JSON
def simulate(host: str, port: int, as_json: bool, **options: Any) -> None:
    """Publish a simulated home to a broker: sensors of several rooms, doors, a camera with drawn scenes."""
    from iotd.demo import simulate as home

    totals = home.run(
        host,
        port,
        seed=options["seed"],
        rate_hz=options["rate"],
        frame_hz=options["frames"],
        speed=options["speed"],
        duration_s=options["for_s"],
        username=options["username"],
        password=_password(options["password_file"]),
        progress=_counter(as_json),
    )
    click.echo(json.dumps(_plain(totals)) if as_json else _counted(totals))


@commands.command()
@click.option("--for", "for_s", type=DURATION, help="Stop after this long; otherwise at Ctrl-C.")
@click.option("--seed", type=int, help="Another home, and other questions.")
@JSON
def demo(for_s: float | None, seed: int | None, as_json: bool) -> int:
    """See it work: a broker, a simulated home, the daemon, and questions whose answers stand beside the truth.

    Brings a very small model of its own. Exit code 0 only if every question was answered in time.
    """
    with _extra("demo"):
        from iotd.demo import run

    return run.run(for_s=for_s, seed=run.SEED if seed is None else seed, as_json=as_json)


@commands.command("eval")
@click.argument("package", required=False, type=click.Path(path_type=Path))
@click.option("--through-daemon", is_flag=True, help="Start a broker, and a daemon with PACKAGE for each home.")
@click.option(
    "--restart-every",
    type=click.IntRange(0),
    default=0,
    help="With it: stop the daemon before each so many-th question, and go on from its snapshot.",
)
@click.option("--target", help="HOST:PORT of a running daemon, in PACKAGE's place; needs --broker.")
@click.option("--broker", help="HOST:PORT of the broker that it reads the demo's topics from.")
@click.option("--questions", type=click.IntRange(1), default=2000, show_default=True, help="How many to ask.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="Compute threads for PACKAGE.")
@click.option(
    "--answers", type=click.File("w", encoding="utf-8"), help="Write each question and answer, as JSON lines."
)
@click.option("--show-wrong", type=click.IntRange(0), default=0, show_default=True, help="Wrong answers to show.")
@JSON
def evaluate(questions: int, answers: IO[str] | None, show_wrong: int, as_json: bool, **who: Any) -> None:
    """Ask the held-out questions about simulated homes, and count the right answers by kind.

    PACKAGE is asked directly. A running daemon keeps its context: start it fresh, and let nobody else publish to it.
    """
    from iotd.demo import evaluate as held_out

    outcomes = []
    with _respondent(**who) as respondent, _progress("asking", questions, as_json) as advance:
        for outcome in held_out.ask(respondent, questions, one_home=who["target"] is not None):
            outcomes.append(outcome)
            if answers:
                click.echo(json.dumps(_plain(outcome), ensure_ascii=False), file=answers)
            advance(1)
    wrong = [outcome for outcome in outcomes if not outcome.right][:show_wrong]
    _tell_scores(outcomes, wrong, as_json)


def _respondent(
    package: Path | None,
    through_daemon: bool,
    restart_every: int,
    target: str | None,
    broker: str | None,
    threads: int,
) -> "PackageRespondent | DaemonRespondent | FreshDaemonRespondent":
    if (package is None) == (target is None):
        raise click.UsageError("give either PACKAGE or --target")
    if (target is None) != (broker is None):
        raise click.UsageError("--target and --broker go together")
    if restart_every and not through_daemon:
        raise click.UsageError("--restart-every goes with --through-daemon")
    if through_daemon and target is not None:
        raise click.UsageError("--through-daemon starts daemons of its own: give PACKAGE in --target's place")
    from iotd.demo.respondents import DaemonRespondent, FreshDaemonRespondent, PackageRespondent

    if package is None:
        assert target is not None and broker is not None
        return DaemonRespondent(target, broker)
    return (
        FreshDaemonRespondent(package, threads, restart_every)
        if through_daemon
        else PackageRespondent(package, threads)
    )


def _tell_scores(outcomes: "Sequence[Outcome]", wrong: "Sequence[Outcome]", as_json: bool) -> None:
    from iotd.demo.evaluate import score, scores

    kinds = scores(outcomes)
    sums = {
        "overall": score(outcomes),
        "without mischief before": score(outcome for outcome in outcomes if not outcome.mischief),
        "with mischief before": score(outcome for outcome in outcomes if outcome.mischief),
    }
    if as_json:
        told: dict[str, object] = {name.replace(" ", "_"): each.figures for name, each in sums.items()}
        told |= {
            "kinds": {kind: each.figures for kind, each in kinds.items()},
            "wrong": [_plain(each) for each in wrong],
        }
        click.echo(json.dumps(told, ensure_ascii=False))
        return
    click.echo(f"{'kind':<24}{'asked':>7}{'right':>7}{'accuracy':>10}   95 % interval")
    for name, each in [*kinds.items(), *sums.items()]:
        low, high = each.interval
        accuracy = f"{each.accuracy:.1%}" if each.asked else "-"
        click.echo(f"{name:<24}{each.asked:>7}{each.right:>7}{accuracy:>10}   {low:.1%} to {high:.1%}")
    for outcome in wrong:
        click.echo(f"\n{outcome.kind}: {outcome.question}")
        click.echo(f"  answer    {outcome.answer!r}\n  expected  {outcome.expected!r}")


def _password(path: Path | None) -> str:
    try:
        return path.read_text(encoding="utf-8").rstrip("\n") if path else ""
    except (OSError, UnicodeDecodeError) as e:
        raise InvalidInput(f"--password-file {path} cannot be read: {e}") from e


def _counter(as_json: bool) -> "Callable[[Totals], None] | None":
    """A line that counts, on a terminal."""
    if as_json or not sys.stderr.isatty():
        return None
    return lambda totals: click.echo(f"\r{_counted(totals)}", nl=False, err=True)


def _counted(totals: "Totals") -> str:
    return f"published: readings {totals.readings}, frames {totals.frames}; lost {totals.lost}"


def _visible(text: str) -> str:
    """On a terminal, without the control characters that could steer it."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t") if sys.stdout.isatty() else text


def _tell_end(answer: "Answer") -> None:
    """Why it ended and how long it took, for a person at the terminal."""
    if not sys.stderr.isatty():
        return
    usage, timings = answer.usage, answer.timings
    text = f"{answer.finish_reason.value}: {usage.generation_tokens} tokens in {timings.total_s:.2f} s"
    text += f", the first after {timings.first_token_s:.2f} s; {usage.context_tokens} tokens of context"
    if answer.session:
        text += f"; go on with --session {answer.session}"
    click.secho(text, dim=True, err=True)


def _load(path: Path | None) -> "Config":
    from iotd import config

    if path is None and DEFAULT_CONFIG.exists():
        path = DEFAULT_CONFIG
    return config.load(path, os.environ)


def _snapshot(config: Path | None) -> Path:
    path = _load(config).snapshot.path
    if not path:
        raise InvalidInput("snapshot.path is empty: this configuration saves no context", field="snapshot.path")
    return Path(path)


def _moment(time_s: float) -> str:
    return datetime.fromtimestamp(time_s).strftime("%Y-%m-%d %H:%M:%S")


def _plain(data: Any) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(data, dict_factory=lambda pairs: {key: getattr(value, "value", value) for key, value in pairs})


def _line(finding: Any) -> str:
    head = click.style("ok     ", fg="green") if finding.ok else click.style("problem", fg="red")
    text = finding.text.replace("\n", "\n" + " " * 17)
    remedy = f"\n{'':17}{finding.remedy}" if finding.remedy else ""
    return f"{head}  {finding.name:<6}  {text}{remedy}"


def main(args: Sequence[str] | None = None) -> NoReturn:
    """The `iotd` command: exit code 1 with one sentence for what went wrong, 2 for wrong usage, 130 for Ctrl-C."""
    try:
        code = commands.main(args=args, prog_name="iotd", standalone_mode=False)
        sys.stdout.flush()
    except (click.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except click.ClickException as e:
        e.show()
        code = e.exit_code
    except IotdError as e:
        click.echo(f"iotd: {e}", err=True)
        code = 1
    except OSError as e:
        if not isinstance(e, BrokenPipeError):
            click.echo(f"iotd: {f'{e.filename}: ' if e.filename else ''}{e.strerror or e}", err=True)
        # Whoever read the output has gone, or its disk is full; the interpreter's own flush at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
