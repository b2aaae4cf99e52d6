"""Text from outside, made safe for one line of the context: UTF-8, no control characters, bounded.

Knows nothing of topics or of what the text means.
"""

import unicodedata

from iotd.ingest.errors import Empty, NotUtf8

MAX_TEXT_CHARS = 240
"""Longer values are cut: at three to four characters a token this is 80 tokens of a window of 2,048."""
MAX_LABEL_CHARS = 64

_KEPT_FORMAT = "\u200c\u200d"
"""Joiners: scripts and emoji need them. Every other format character (direction overrides, byte order mark) goes."""


def one_line(text: str, limit: int = MAX_TEXT_CHARS) -> str:
    """`text` without control characters and lone surrogates, white space collapsed, at most `limit` characters."""
    kept = "".join(_safe(c) for c in text[: 4 * limit])
    line = " ".join(kept.split())
    return line if len(line) <= limit and len(text) <= 4 * limit else line[: limit - 1].rstrip() + "…"


def _safe(c: str) -> str:
    if c.isascii():
        return c if c.isprintable() else " "
    category = unicodedata.category(c)
    if category == "Cs" or (category == "Cf" and c not in _KEPT_FORMAT):
        return ""
    return " " if category in ("Cc", "Zl", "Zp") else c


def decode_utf8(payload: bytes) -> str:
    """Raises NotUtf8, naming the first byte that does not fit."""
    try:
        return payload.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise NotUtf8(f"the payload is not UTF-8: byte {payload[e.start]:#04x} at {e.start}") from e


def render_text(payload: bytes, unit: str = "") -> str:
    """A text payload as the context shows it: `23.4` with unit `°C` is `23.4 °C`. Raises NotUtf8 or Empty."""
    line = one_line(decode_utf8(payload))
    if not line:
        raise Empty("the payload is empty")
    return with_unit(line, unit)


def with_unit(value: str, unit: str) -> str:
    return f"{value} {unit}" if unit else value
