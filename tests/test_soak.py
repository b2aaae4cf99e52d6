"""Long runs: what must not grow. Minutes each, so they are marked heavy.

`IOTD_SOAK_PACKAGE=FOLDER pytest -m heavy tests/test_soak.py` runs them on that package instead of a tiny one.
"""

import os
import sys
import time
from pathlib import Path

import pytest

from iotd.config import AskConfig, ContextConfig
from iotd.engine import Engine
from iotd.events import Reading
from iotd.model import Model
from iotd.ops import board

pytestmark = pytest.mark.heavy

FIRST, LAST = 2_000, 20_000
ALLOWED_NBYTES = 2_000_000


@pytest.fixture
def package(tiny_int4_package: Path) -> Path:
    return Path(os.environ.get("IOTD_SOAK_PACKAGE") or tiny_int4_package)


def test_memory_is_constant_over_20000_tokens(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Resident memory after 20,000 tokens of readings is what it was after the first 2,000."""
    engine = Engine(Model.open(package), ContextConfig(window=2048), AskConfig())
    engine.start()
    try:
        first = _stream(engine, FIRST)
        last = _stream(engine, LAST)
    finally:
        engine.stop()
    with capsys.disabled():
        sys.stdout.write(f"\n  resident: {first / 1e6:.2f} MB after {FIRST} tokens, {last / 1e6:.2f} after {LAST}\n")
    assert abs(last - first) <= ALLOWED_NBYTES


def _stream(engine: Engine, n_tokens: int) -> int:
    """Feed readings as fast as they are read, until that many tokens went in. Returns resident bytes."""
    n = 0
    while (status := engine.status()).counters["context_tokens_read"] < n_tokens:
        if status.backlog < 8:
            n += 1
            engine.observe(Reading(f"room {n % 7} temperature", f"{20 + n % 50 / 10:.1f} °C", time.time()))
        else:
            time.sleep(0.001)  # nothing to wait for but the engine's own pace
    return board.resident_nbytes()
