"""A daemon in a process of its own that reads the simulated home from a broker."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from iotd.demo.child import Child, child
from iotd.demo.devices import home_subscriptions


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
    # The demo's model knows no such line.
    ask = {"tell_length": False, **sections.pop("ask", {})}
    document = {"model": model, "mqtt": mqtt, "ask": ask, "grpc": {"listen": "127.0.0.1:0"}, "snapshot": {"path": ""}}
    document |= sections
    with tempfile.TemporaryDirectory(prefix=f"iotd-{node}-") as folder:
        config = Path(folder) / "iotd.yaml"
        config.write_text(json.dumps(document))
        with child("the daemon", "serve", "-c", str(config), env={"IOTD_LOG__FORMAT": "json"}) as daemon:
            yield daemon, daemon.wait_for("ready", start_s)["grpc"]
