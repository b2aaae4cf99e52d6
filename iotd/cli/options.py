"""What the options of several commands have in common."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

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


class JsonText(click.Path):
    """A JSON object as it is, or a file with one. Gives its text."""

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Read the file; fails with a usage error."""
        if value.lstrip().startswith("{"):
            return str(value)
        super().convert(value, param, ctx)
        return Path(value).read_text("utf-8", errors="replace")


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


THREADS = click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="Compute threads.")
HEAD = click.option(
    "--head",
    type=click.Choice(["auto", "exact", "two-stage", "coarse"]),
    default="auto",
    show_default=True,
    help="As model.head has it; coarse is two-stage that never falls back, as random weights make it do.",
)
