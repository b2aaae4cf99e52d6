"""Sets keys in a configuration file, and leaves all else in it as it stands, comments too."""

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import yaml

from iotd import config
from iotd.errors import ConfigError
from iotd.files import put

Values = Mapping[str, int | bool]


def write(path: Path, section: str, values: Values) -> None:
    """Replace the file by one that sets the keys of one section: after a crash at any moment it is the old or the new.

    Raises ConfigError where the file is not valid, or is written in such a way that it cannot be edited; OSError.
    """
    path = path.resolve()  # a link stays one
    config.load(path, {})
    text = edited(path.read_bytes().decode(), section, values)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_bytes(text.encode())
    shutil.copymode(path, unfinished)
    with suppress(PermissionError):
        os.chown(unfinished, path.stat().st_uid, path.stat().st_gid)
    put(unfinished, path)


def edited(text: str, section: str, values: Values) -> str:
    """The text with the values, each in place of its old one or at the section's beginning. Raises ConfigError."""
    wanted = yaml.safe_load(text) or {}
    wanted[section] = (wanted.get(section) or {}) | dict(values)
    lines = {key: str(value).lower() for key, value in values.items()}
    try:
        for key in reversed(lines):
            text = _with(text, section, key, lines[key])
        if yaml.safe_load(text) == wanted:
            return text
    except yaml.YAMLError:
        pass
    written = "".join(f"\n  {key}: {value}" for key, value in lines.items())
    raise ConfigError(
        f"it is written in a way that cannot be edited; set this yourself:\n{section}:{written}", field=section
    )


def _with(text: str, section: str, key: str, value: str) -> str:
    """With one value. What comes of an unusual way of writing is for the caller to check."""
    found = _entry(yaml.compose(text, Loader=yaml.SafeLoader), section)
    if found is None:
        return f"{text.rstrip()}\n\n{section}:\n  {key}: {value}\n".lstrip()
    name, node = found
    if (entry := _entry(node, key)) is not None:
        begin, end = entry[1].start_mark.index, entry[1].end_mark.index
        return text[:begin] + (value if begin < end else f" {value}") + text[end:]
    if isinstance(node, yaml.MappingNode) and node.flow_style:
        at, line = node.start_mark.index + 1, f"{key}: {value}, "
    else:
        indent = node.value[0][0].start_mark.column if isinstance(node, yaml.MappingNode) else 2
        at, line = (
            name.end_mark.index + len(text[name.end_mark.index :].partition("\n")[0]),
            f"\n{'':{indent}}{key}: {value}",
        )
    return text[:at] + line + text[at:]


def _entry(node: yaml.Node | None, key: str) -> tuple[yaml.Node, yaml.Node] | None:
    """Of a mapping: the nodes of a key and of its value."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((pair for pair in pairs if pair[0].value == key), None)
