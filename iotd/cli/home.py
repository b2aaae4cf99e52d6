"""The simulated home: simulate, demo, eval."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from iotd.cli.options import DURATION, FILE, HEAD, JSON, THREADS, Number
from iotd.cli.show import extra, plain, progress
from iotd.errors import InvalidInput

if TYPE_CHECKING:
    from iotd.demo.evaluate import Outcome
    from iotd.demo.respondents import DaemonRespondent, FreshDaemonRespondent, PackageRespondent
    from iotd.demo.simulate import Totals
    from iotd.model.head import HeadChoice


@click.command()
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
    click.echo(json.dumps(plain(totals)) if as_json else _counted(totals))


@click.command()
@click.option("--for", "for_s", type=DURATION, help="Stop after this long; otherwise at Ctrl-C.")
@click.option("--seed", type=int, help="Another home, and other questions.")
@JSON
def demo(for_s: float | None, seed: int | None, as_json: bool) -> int:
    """See it work: a broker, a simulated home, the daemon, and questions whose answers stand beside the truth.

    Brings a very small model of its own. Exit code 0 only if every question was answered in time.
    """
    with extra("demo"):
        from iotd.demo import run

    return run.run(for_s=for_s, seed=run.SEED if seed is None else seed, as_json=as_json)


@click.command("eval")
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
@THREADS
@HEAD
@click.option("--max-image-pixels", type=click.IntRange(1024), help="Make PACKAGE's images no larger than this.")
@click.option(
    "--answers", type=click.File("w", encoding="utf-8"), help="Write each question and answer, as JSON lines."
)
@click.option("--show-wrong", type=click.IntRange(0), default=0, show_default=True, help="Wrong answers to show.")
@JSON
def evaluate(questions: int, answers: IO[str] | None, show_wrong: int, as_json: bool, **who: Any) -> None:
    """Ask the held-out questions about simulated homes, and count the right answers by kind.

    Each is answered twice: with the likeliest token each time, which all figures but "drawn" are of, and as a daemon
    draws an answer by default, with seeds that are the same in every run.

    Of questions for yes or no it says, too, how true the probabilities are that `iotd classify` gives: the expected
    calibration error, and the temperature that would make it smallest.

    PACKAGE is asked directly, with --head and --max-image-pixels; daemons have theirs. A running daemon keeps its
    context: start it fresh, and let nobody else publish to it.
    """
    from iotd.demo import evaluate as held_out

    outcomes = []
    with _respondent(**who) as respondent, progress("asking", questions, as_json) as advance:
        for outcome in held_out.ask(respondent, questions, one_home=who["target"] is not None):
            outcomes.append(outcome)
            if answers:
                click.echo(json.dumps(plain(outcome), ensure_ascii=False), file=answers)
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
    head: "HeadChoice",
    max_image_pixels: int | None,
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
        else PackageRespondent(package, threads, head, max_image_pixels)
    )


def _tell_scores(outcomes: "Sequence[Outcome]", wrong: "Sequence[Outcome]", as_json: bool) -> None:
    from iotd.demo.calibration import calibration
    from iotd.demo.evaluate import by_kind, score

    weighed = calibration([case for outcome in outcomes if (case := outcome.case) is not None])
    kinds = by_kind(outcomes)
    sums = {
        "overall": outcomes,
        "without mischief before": [outcome for outcome in outcomes if not outcome.mischief],
        "with mischief before": [outcome for outcome in outcomes if outcome.mischief],
    }
    if as_json:
        told: dict[str, object] = {name.replace(" ", "_"): score(each).figures for name, each in sums.items()}
        told |= {
            "kinds": {kind: score(each).figures for kind, each in kinds.items()},
            "drawn": score(outcomes, drawn=True).figures,
            "drawn_kinds": {kind: score(each, drawn=True).figures for kind, each in kinds.items()},
            "calibration": plain(weighed) if weighed is not None else None,
            "wrong": [plain(each) for each in wrong],
        }
        click.echo(json.dumps(told, ensure_ascii=False))
        return
    click.echo(f"{'kind':<24}{'asked':>7}{'right':>7}{'accuracy':>10}   {'95 % interval':<18}{'drawn':>8}")
    for name, group in [*kinds.items(), *sums.items()]:
        each, drawn = score(group), score(group, drawn=True)
        interval = "{:.1%} to {:.1%}".format(*each.interval)
        accuracy, of_drawn = (f"{its.accuracy:.1%}" if its.asked else "-" for its in (each, drawn))
        click.echo(f"{name:<24}{each.asked:>7}{each.right:>7}{accuracy:>10}   {interval:<18}{of_drawn:>8}")
    if weighed is not None:
        click.echo(
            f"\ncalibration of yes and no: {weighed.right} of {weighed.asked} right, error {weighed.error:.4f}\n"
            f"temperature {weighed.temperature:.2f}, fitted to every other question, makes it "
            f"{weighed.rest_error_at_temperature:.4f} for the rest, from {weighed.rest_error:.4f}"
        )
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
