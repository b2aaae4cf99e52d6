"""Keys are set in a configuration file, and everything else in it stays as it was."""

from pathlib import Path

import pytest

from iotd import config_file
from iotd.config import load
from iotd.config_file import edited
from iotd.errors import ConfigError

EXAMPLE = Path(__file__).parents[1] / "deploy" / "iotd.yaml"
VALUES = {"threads": 3, "spinning": False}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("model:\n  threads: 0 # why\n  path: a\n", "model:\n  spinning: false\n  threads: 3 # why\n  path: a\n"),
        ("model:\n    # where\n    path: a", "model:\n    threads: 3\n    spinning: false\n    # where\n    path: a"),
        ("model: # this\n\n# that\nlog: {}\n", "model: # this\n  threads: 3\n  spinning: false\n\n# that\nlog: {}\n"),
        ("model:\n  threads:\n  spinning: yes\n", "model:\n  threads: 3\n  spinning: false\n"),
        ("model: {path: 'a: #'}\n", "model: {threads: 3, spinning: false, path: 'a: #'}\n"),
        ("log:\n  level: info\n", "log:\n  level: info\n\nmodel:\n  threads: 3\n  spinning: false\n"),
        ("", "model:\n  threads: 3\n  spinning: false\n"),
        ("# nothing\n", "# nothing\n\nmodel:\n  threads: 3\n  spinning: false\n"),
        ('"model":\r\n  "threads": 1\r\n  spinning: true\r\n', '"model":\r\n  "threads": 3\r\n  spinning: false\r\n'),
    ],
)
def test_values_are_set_where_they_belong(before: str, after: str) -> None:
    assert edited(before, "model", VALUES) == after


@pytest.mark.parametrize("text", ["{log: {level: info}}\n", "log: {}\n...\n", "? model\n: threads: 1\n"])
def test_what_cannot_be_edited_is_said_with_what_to_write(text: str) -> None:
    with pytest.raises(ConfigError, match=r"set this yourself:\nmodel:\n  threads: 3\n  spinning: false$"):
        edited(text, "model", VALUES)


def test_the_example_keeps_every_other_line(tmp_path: Path) -> None:
    path, link = tmp_path / "iotd.yaml", tmp_path / "link.yaml"
    path.write_text(EXAMPLE.read_text())
    path.chmod(0o640)
    link.symlink_to(path)
    config_file.write(link, "model", VALUES)
    before, after = EXAMPLE.read_text().splitlines(), path.read_text().splitlines()
    changed = {old: new for old, new in zip(before, after, strict=True) if old != new}
    assert changed == {"  threads: 0": "  threads: 3", "  spinning: true": "  spinning: false"}
    assert (load(path, {}).model.threads, load(path, {}).model.spinning) == (3, False)
    assert (link.is_symlink(), path.stat().st_mode & 0o777) == (True, 0o640)
    assert {entry.name for entry in tmp_path.iterdir()} == {"iotd.yaml", "link.yaml"}


def test_a_file_with_errors_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "iotd.yaml"
    path.write_text("model:\n  thread: 1\n")
    with pytest.raises(ConfigError, match="did you mean threads"):
        config_file.write(path, "model", VALUES)
    assert path.read_text() == "model:\n  thread: 1\n"
