"""One question to a running daemon."""

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from iotd.cli.options import DURATION, FILE, JSON, TARGET, TLS, JsonText, Number
from iotd.cli.show import plain, visible

if TYPE_CHECKING:
    from iotd.client import Answer


def QUESTION(command: Callable[..., Any]) -> Callable[..., Any]:  # noqa: N802 - stands among options
    """The question, what is put before it, and whom it is for."""
    for option in (
        click.option("--sensor", "sensors", multiple=True, help="The same, of this label or pattern; repeatable."),
        click.option("--exact", is_flag=True, help="Put exact figures of the sensors it names before the question."),
        click.option("--no-context", is_flag=True, help="Ask the model alone, without the stream of readings."),
        TLS,
        TARGET,
        click.option("--budget", type=DURATION, help="Time for it all, such as 2s; the server's default otherwise."),
        click.option("--camera", help="Puts this camera's newest frame before the question."),
        click.option(
            "--image", "images", type=FILE, multiple=True, help="JPEG or PNG put before the question; repeatable."
        ),
        click.argument("question"),
    ):
        command = option(command)
    return command


@click.command()
@QUESTION
@click.option("--keep-session", is_flag=True, help="Keep where the answer ends; says by which name to go on.")
@click.option("--session", help="Go on from the answer that was kept under this name.")
@click.option("--catch-up", is_flag=True, help="With --session: read what has come since, before the question.")
@click.option("--json-schema", type=JsonText(), help="Answer in JSON that is valid by this schema: a file, or JSON.")
@click.option("--regex", help="Answer in a text that matches this, in the syntax of Rust's regex crate.")
@click.option("--choice", "choices", multiple=True, help="Answer with this or another choice; repeatable.")
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer, in tokens.")
@click.option("--temperature", type=Number(0), help="0 takes the most likely token each time.")
@click.option("--seed", type=click.IntRange(0), help="The same seed gives the same answer.")
@click.option("--thinking", is_flag=True, help="Let the model think first; a terminal shows how.")
@JSON
def ask(question: str, target: str, as_json: bool, **options: Any) -> None:
    """Ask the daemon one QUESTION; the answer streams to the terminal."""
    from iotd.client import Client

    files, options = _for_client(options)
    options |= {"thinking": options["thinking"] or None, "choices": options["choices"] or None}
    with Client(target, **files) as client, client.ask(question, **options) as answer:
        answer.on_thought = partial(_tell_thought, as_json=as_json)
        for n, piece in enumerate(answer):
            if n == 0 and not as_json:
                _end_thoughts(answer.thoughts)
            click.echo(json.dumps({"delta": piece}) if as_json else visible(piece), nl=as_json)
            sys.stdout.flush()
        if as_json:
            click.echo(json.dumps({"done": plain(answer.done)}))
        else:
            click.echo()
            _tell_end(answer.result)


def _tell_thought(piece: str, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"thought": piece}))
        sys.stdout.flush()
    elif sys.stderr.isatty():
        click.secho(visible(piece, err=True), dim=True, nl=False, err=True)


def _end_thoughts(thoughts: str) -> None:
    """So that the answer begins on a line of its own."""
    if sys.stderr.isatty() and thoughts and not thoughts.endswith("\n"):
        click.echo(err=True)


@click.command()
@QUESTION
@click.option("--label", "labels", multiple=True, required=True, help="How the answer may begin; repeatable.")
@click.option("--none-of-these", is_flag=True, help="Say, too, how probable it is that it begins with none of them.")
@click.option("--length-normalized", is_flag=True, help="Do not put long labels at a disadvantage.")
@click.option("--temperature", type=Number(0, min_open=True), help="Divides the scores; `iotd eval` measures it.")
@JSON
def classify(question: str, labels: tuple[str, ...], target: str, as_json: bool, **options: Any) -> None:
    """How probable each label is as the answer to one QUESTION, from reading it alone: the likeliest first."""
    from iotd.client import Client

    files, options = _for_client(options)
    with Client(target, **files) as client:
        found = client.classify(question, labels, **options)
    if as_json:
        click.echo(json.dumps({"best": found.best, **plain(found)}, ensure_ascii=False))
        return
    for label, probability in sorted(found.probabilities.items(), key=lambda item: -item[1]):
        click.echo(f"{probability:>7.2%}  {visible(label)}")
    if found.none_probability is not None:
        click.echo(f"{found.none_probability:>7.2%}  (none of these)")


def _for_client(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The files of the client's TLS, and the other options by the client's names for them."""
    files = {name: options.pop(name) for name in ("ca_file", "cert_file", "key_file")}
    named = {
        "budget_s": options.pop("budget"),
        "use_context": not options.pop("no_context"),
        "exact_readings": options.pop("exact"),
    }
    return files, options | named


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
