"""JSON payloads rendered as one line: `{"temperature": 23.4, "humidity": 40}` → `temperature 23.4 °C, humidity 40 %`.

One reading for the whole payload and not one for each field: the time and the label are then written once.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from iotd.ingest.errors import Empty, MissingField, NotJson
from iotd.ingest.text import decode_utf8, one_line, with_unit

MAX_FIELDS = 16
"""Fields taken from one payload where the configuration names none."""
MAX_VALUE_CHARS = 80

_ABSENT = object()


def render_json(payload: bytes, fields: Mapping[str, str], unit: str = "") -> str:
    """A JSON payload as the context shows it.

    fields: dotted path of each field to take, with its unit; list items by number. None: every scalar at the top.
    Fields that a payload leaves out are left out of the line: devices send what changed. `null`, NaN and infinities
    are `unknown`. Raises NotUtf8, NotJson, Empty, or MissingField where none of the fields is there.
    """
    value = parse_json(payload)
    if not fields and not isinstance(value, dict):
        return _bare(value, unit)
    taken = list(_named(value, fields) if fields else _scalars(value))
    if not taken:
        raise MissingField(_missing(value, fields))
    if [path for path, *_ in taken] == ["value"]:
        return one_line(_shown(*taken[0][1:]))
    return one_line(", ".join(f"{_name(path)} {_shown(item, unit)}".strip() for path, item, unit in taken))


def parse_json(payload: bytes) -> Any:
    """Raises NotUtf8, Empty or NotJson, saying where it stops making sense."""
    text = decode_utf8(payload)
    if not text.strip():
        raise Empty("the payload is empty")
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except RecursionError as e:
        raise NotJson("the payload is nested too deeply") from e
    except json.JSONDecodeError as e:
        raise NotJson(f"the payload is not JSON: {e}") from e
    except ValueError as e:  # Python turns no more than 4,300 digits into an int: sys.get_int_max_str_digits
        raise NotJson("a number in the payload has thousands of digits") from e


def _named(value: Any, fields: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
    for path, unit in fields.items():
        item = _lookup(value, path)
        if item is not _ABSENT:
            yield path, item, unit


def _scalars(value: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    scalars = ((key, item, "") for key, item in value.items() if not isinstance(item, dict | list))
    for _, scalar in zip(range(MAX_FIELDS), scalars, strict=False):
        yield scalar


def _lookup(value: Any, path: str) -> Any:
    """The item at a dotted path; a key that itself contains dots is found first."""
    if isinstance(value, dict) and path in value:
        return value[path]
    for part in path.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isascii() and part.isdigit() and len(part) < 7 and int(part) < len(value):
            value = value[int(part)]
        else:
            return _ABSENT
    return value


def _missing(value: Any, fields: Mapping[str, str]) -> str:
    wanted = ", ".join(fields) or "any plain value at the top"
    if not isinstance(value, dict):
        return f"the payload has no field {wanted}: it is no object"
    return f"the payload has no field {wanted}: it has {one_line(', '.join(value), 120) or 'none'}"


def _bare(value: Any, unit: str) -> str:
    line = _shown(value, unit)
    if not line:
        raise Empty("the payload is empty")
    return one_line(line)


def _name(path: str) -> str:
    return one_line(path.replace(".", " ").replace("_", " "), MAX_VALUE_CHARS)


def _shown(value: Any, unit: str) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "unknown"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return with_unit(_short(value), unit)
    if isinstance(value, int):
        return with_unit(_whole(value), unit)
    if isinstance(value, str):
        line = one_line(value, MAX_VALUE_CHARS)
        return with_unit(line, unit) if line else ""
    return one_line(json.dumps(value, ensure_ascii=False, separators=(",", ":")), MAX_VALUE_CHARS)


def _short(value: float) -> str:
    """Without the noise of binary fractions: 23.400000000000002 is 23.4."""
    return f"{value:.10g}" if abs(value) < 1e10 else repr(value)


def _whole(value: int) -> str:
    return str(value) if abs(value) < 10**18 else f"{value:.6e}" if abs(value) < 10**300 else "unknown"
