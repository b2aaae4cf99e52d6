"""One message → one event. Pure: no clock, no thread, no state."""

from iotd.events import Frame, Observation, Reading
from iotd.ingest.errors import TooLarge
from iotd.ingest.fields import render_json
from iotd.ingest.image import decode_image
from iotd.ingest.routes import Route
from iotd.ingest.text import render_text

MAX_TEXT_BYTES = 64 * 1024
"""Text and JSON payloads with more are refused: a line of the context has 240 characters."""


def parse(route: Route, payload: bytes, time_s: float, *, max_pixels: int, keep_pixels: int) -> Observation:
    """The event a payload stands for. time_s: seconds since the Unix epoch. The limits are decode_image's.

    Raises InvalidInput (one of ingest.errors) and nothing else, whatever the bytes.
    """
    subscription = route.subscription
    if subscription.kind == "image":
        return Frame(route.label, decode_image(payload, max_pixels=max_pixels, keep_pixels=keep_pixels), time_s)
    if subscription.kind == "json":
        return Reading(route.label, render_json(payload, subscription.fields, subscription.unit), time_s)
    return Reading(route.label, render_text(payload, subscription.unit), time_s)


def check_size(route: Route, nbytes: int, *, max_payload_bytes: int) -> None:
    """Raises TooLarge; costs nothing, so it can be asked before a payload is queued."""
    limit = max_payload_bytes if route.subscription.kind == "image" else min(MAX_TEXT_BYTES, max_payload_bytes)
    if nbytes > limit:
        raise TooLarge(f"the payload has {nbytes:,} bytes; at most {limit:,} are allowed")
