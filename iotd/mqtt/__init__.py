"""The link to an MQTT broker, by which readings, frames and questions come. The only place that uses paho.

Knows no engine and no model.
"""

from iotd.mqtt.link import Link

__all__ = ["Link"]
