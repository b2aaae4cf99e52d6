"""The daemon and what belongs to it: serve, check, top, state."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from iotd.cli.options import CONFIG, DEFAULT_CONFIG, DURATION, JSON, TARGET, TLS
from iotd.cli.show import plain
from iotd.errors import InvalidInput, IotdError

if TYPE_CHECKING:
    from iotd.config import Config


@click.command()
@CONFIG
def serve(config: Path | None) -> int:
    """Run the daemon: read sensors and cameras over MQTT, answer over gRPC and MQTT.

    SIGTERM drains and stops, SIGHUP reloads the configuration, SIGUSR1 saves the context.
    """
    # Until the daemon listens for them: one that comes this early has nothing to act on, and must not end it.
    for number in (signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    from iotd import app

    return app.serve(lambda: load(config))


@click.command()
@CONFIG
@JSON
def check(config: Path | None, as_json: bool) -> int:
    """Say what would keep `serve` from working, and what it would do. Opens the model, and starts nothing."""
    from iotd.ops.preflight import Finding

    try:
        loaded = load(config)
    except IotdError as e:
        unread = isinstance(e.__cause__, OSError)
        remedy = "name a file that is there and that this user can read" if unread else "correct these lines"
        findings = [Finding("config", False, str(e), remedy)]
    else:
        from iotd import app

        findings = [Finding("config", True, "no errors"), *app.check(loaded)]
    if as_json:
        click.echo(json.dumps({"ok": all(f.ok for f in findings), "findings": [plain(f) for f in findings]}))
    else:
        for finding in findings:
            click.echo(_line(finding))
    return 0 if all(f.ok for f in findings) else 1


@click.command()
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
            show(json.dumps(plain(now)) if as_json else "\n".join(lines(now, before, time.time())))
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


@click.group()
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
        click.echo(json.dumps({"path": str(path)} | (plain(found) if found else {})))
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


def load(path: Path | None) -> "Config":
    from iotd import config

    if path is None and DEFAULT_CONFIG.exists():
        path = DEFAULT_CONFIG
    return config.load(path, os.environ)


def _snapshot(config: Path | None) -> Path:
    path = load(config).snapshot.path
    if not path:
        raise InvalidInput("snapshot.path is empty: this configuration saves no context", field="snapshot.path")
    return Path(path)


def _moment(time_s: float) -> str:
    return datetime.fromtimestamp(time_s).strftime("%Y-%m-%d %H:%M:%S")


def _line(finding: Any) -> str:
    head = click.style("ok     ", fg="green") if finding.ok else click.style("problem", fg="red")
    text = finding.text.replace("\n", "\n" + " " * 17)
    remedy = f"\n{'':17}{finding.remedy}" if finding.remedy else ""
    return f"{head}  {finding.name:<6}  {text}{remedy}"
