"""A daemon in a process of its own that reads the simulated home from a broker."""

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from iotd.demo.child import Child, child
from iotd.demo.devices import home_subscriptions
from iotd.errors import Unavailable

T = TypeVar("T")

START_S = 60.0
"""How long what is started may take until it runs."""
POLL_S = 0.1
"""Between two looks for what is waited for."""
DEMO_SECTIONS: dict[str, dict[str, Any]] = {
    "context": {"window": 1024},
    "ask": {"temperature": 0.0},
}
"""What suits the demo's model: it was trained on streams of about 700 tokens."""


@contextlib.contextmanager
def home_daemon(
    package: Path, broker: tuple[str, int], *, node: str, start_s: float, **sections: dict[str, Any]
) -> Iterator[tuple[Child, str]]:
    """The running daemon, and HOST:PORT of its gRPC.

    sections: of its configuration, besides what it needs here. Raises Unavailable where it is not ready in start_s.
    """
    host, port = broker
    mqtt = {"host": host, "port": port, "node": node, "subscriptions": msgspec.to_builtins(home_subscriptions())}
    model = {"path": str(package.absolute()), **sections.pop("model", {})}
    document = {"model": model, "mqtt": mqtt, "grpc": {"listen": "127.0.0.1:0"}, "snapshot": {"path": ""}, **sections}
    with tempfile.TemporaryDirectory(prefix=f"iotd-{node}-") as folder:
        config = Path(folder) / "iotd.yaml"
        config.write_text(json.dumps(document))
        with child("the daemon", "serve", "-c", str(config), env={"IOTD_LOG__FORMAT": "json"}) as daemon:
            yield daemon, daemon.wait_for("ready", start_s)["grpc"]


def wait_for(what: str, find: Callable[[], T | None]) -> T:
    """What `find` finds, as soon as it does. Raises Unavailable where that takes longer than START_S."""
    end_s = time.monotonic() + START_S
    while not (found := find()):
        if time.monotonic() > end_s:
            raise Unavailable(f"no {what} within {START_S:g} s")
        time.sleep(POLL_S)
    return found
