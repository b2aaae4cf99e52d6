"""The link to an MQTT broker. The only place that uses paho; knows no engine and no model."""

from iotd.mqtt.link import Link

__all__ = ["Link"]
