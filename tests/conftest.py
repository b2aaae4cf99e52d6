"""Fixtures for all tests: tiny model packages of random weights, made once for a run."""

from pathlib import Path

import pytest

from iotd.convert.convert import convert_random


@pytest.fixture(scope="session")
def tiny_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 package with vision, of a shape in which every pair of sizes that could be mixed up is unequal."""
    out = tmp_path_factory.mktemp("packages") / "tiny"
    convert_random("tiny", out, recipe="fp32")
    return out


@pytest.fixture(scope="session")
def tiny_int4_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights under the default recipe."""
    out = tmp_path_factory.mktemp("packages") / "tiny-int4"
    convert_random("tiny", out)
    return out


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
