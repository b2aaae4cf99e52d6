"""The command line: parses arguments, calls the parts, shows what they give. Everything heavy is imported on use."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from iotd import __version__
from iotd.cli.ask import ask, classify
from iotd.cli.bench import bench
from iotd.cli.daemon import check, serve, state, top
from iotd.cli.home import demo, evaluate, simulate
from iotd.cli.models import convert, pull
from iotd.errors import IotdError

INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="iotd", message="%(prog)s %(version)s")
def commands() -> None:
    """A warm vision-language model for the sensors and cameras around a small board."""


@commands.command()
def version() -> None:
    """Print the version."""
    click.echo(f"iotd {__version__}")


for command in (serve, check, top, state, ask, classify, convert, pull, bench, simulate, demo, evaluate):
    commands.add_command(command)


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
