"""For all tests: tiny model packages of random weights, made once for a run, and where examples come from.

`pytest` tries the same examples in each run, so that it passes or fails by what was changed; `pytest -m heavy` tries
other ones each time, in rounds. No example has a time limit.
"""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings

from iotd.convert.convert import convert_random

ROUNDS = 10
"""Of other examples, in the heavy tests."""

settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("random", deadline=None, suppress_health_check=[HealthCheck.too_slow])


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("random" if _heavy(config) else "same")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if _heavy(metafunc.config) and is_hypothesis_test(metafunc.function):
        rounds = [pytest.param(n, marks=pytest.mark.heavy) for n in range(ROUNDS)]
        metafunc.parametrize("_round", rounds, indirect=True)


def _heavy(config: pytest.Config) -> bool:
    return config.getoption("markexpr") == "heavy"


@pytest.fixture(autouse=True)
def _round(request: pytest.FixtureRequest) -> None:
    """Of a property-based test, in the heavy tests."""


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
