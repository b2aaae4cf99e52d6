"""A plot holds what was measured, in a file that any browser shows."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from iotd.cli import commands
from iotd.ops.bench import Figure, figure
from iotd.ops.plot import BOTTOM, TOP, svg

SVG = "{http://www.w3.org/2000/svg}"
FIGURES = [
    figure("load", "s", [1.0]),
    figure("prefill 16", "tokens/s", [50.0], chart="prefill", at=16),
    figure("prefill 64", "tokens/s", [90.0, 100.0, 120.0], chart="prefill", at=64),
    figure("prefill 1024", "tokens/s", [80.0], chart="prefill", at=1024),
    figure("decode, iotd", "tokens/s", [40.0], chart="decode at 512, in turn"),
    figure("decode, <peer>", "tokens/s", [20.0], chart="decode at 512, in turn", engine="<peer>"),
    figure("resident", "MB", [700.0], chart="resident memory"),
]


def drawn(figures: list[Figure], caption: str = "") -> ElementTree.Element:
    return ElementTree.fromstring(svg(figures, caption))


def texts(root: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def test_axes_have_units_and_bars_have_names() -> None:
    found = texts(drawn(FIGURES, "a machine & its threads"))
    for text in (
        "prefill, tokens/s",
        "tokens of the prompt",
        "1024",
        "iotd",
        "<peer>",
        "40",
        "a machine & its threads",
    ):
        assert text in found
    assert "resident memory, MB" not in found  # alone it tells nothing


def test_points_stand_where_their_values_are() -> None:
    """The axis begins at 0; a length that is twice another one stands as far on."""
    root = drawn(FIGURES)
    places = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in root.iter(f"{SVG}circle")]
    (x16, y50), (x64, y100), (x1024, _) = places
    assert BOTTOM - y100 == pytest.approx(2 * (BOTTOM - y50), abs=0.2)
    assert x1024 - x64 == pytest.approx(2 * (x64 - x16), abs=0.2)
    ours, theirs = (float(bar.get("height", 0)) for bar in root.iter(f"{SVG}rect"))
    assert ours == pytest.approx(2 * theirs, abs=0.2)
    assert all(TOP <= float(line.get("y1", 0)) <= BOTTOM + 4 for line in root.iter(f"{SVG}line"))


@pytest.mark.parametrize("highest", [0.0013, 0.4, 1.0, 49.0, 9999.0])
def test_any_height_has_four_to_ten_lines(highest: float) -> None:
    found = texts(
        drawn([figure("a", "s", [highest / 3], chart="a"), figure("b", "s", [highest], chart="a", engine="b")])
    )
    assert 4 <= len(found[1:-4]) - 1 <= 10


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_draws_beside_its_output(as_json: bool, tiny_package: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.svg"
    args = ["bench", str(tiny_package), "--threads", "1", "--repeat", "1", "--plot", str(path)]
    result = CliRunner().invoke(commands, [*args, *["--json"] * as_json], catch_exceptions=False)
    if as_json:
        lines = [json.loads(line) for line in result.output.splitlines()]
        assert {"name": "prefill 16", "chart": "prefill", "at": 16, "engine": "iotd"}.items() <= lines[1].items()
    found = texts(ElementTree.fromstring(path.read_text()))
    assert "image encoding, s" in found
    assert any("1 threads; medians of 1" in text for text in found)
