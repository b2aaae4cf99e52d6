"""Payload → event: text, JSON and images, and the bounded way in that parses them. Knows no broker and no model."""

from iotd.ingest.image import decode_image
from iotd.ingest.intake import Intake
from iotd.ingest.routes import Routes

__all__ = ["Intake", "Routes", "decode_image"]
