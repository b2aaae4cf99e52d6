"""What work was measured to take on this machine, kept in the cache from one start to the next."""

import logging
from contextlib import suppress
from pathlib import Path

import msgspec

from iotd.files import put
from iotd.model.package import cache_folder
from iotd.model.packed import machine_key

log = logging.getLogger(__name__)

Samples = dict[str, list[list[float]]]
"""As `iotd.engine.costs.Costs` packs them."""
FORMAT = 1
"""To be raised with whatever changes what a sample means."""


def load(*what: str) -> Samples:
    """Measurements of the same work on the same machine; none where there are none that can be read.

    what: all that they depend on besides the machine.
    """
    with suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode(_path(*what).read_bytes(), type=Samples)
    return {}


def save(samples: Samples, *what: str) -> None:
    """Keep them; where that is not possible, the next start measures again."""
    path = _path(*what)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_bytes(msgspec.json.encode(samples))
        put(unfinished, path)
    except OSError as error:
        log.warning("the next start measures again what work takes here: %s", error)


def _path(*what: str) -> Path:
    return cache_folder() / "costs" / f"{machine_key(str(FORMAT), *what)}.json"
