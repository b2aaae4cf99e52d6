"""One look at the broker, for `iotd check`: connects as a stranger, leaves at once, publishes nothing."""

import secrets
import time

import paho.mqtt.client as paho
from msgspec.structs import replace
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from iotd.config import MqttConfig
from iotd.errors import Unavailable
from iotd.mqtt.dial import Protocol, connect, new_client

ANSWER_S = 5.0


def probe(config: MqttConfig) -> str:
    """What the broker speaks, such as `MQTT 5`. Raises OSError, ConfigError, or Unavailable with the broker's reason.

    The client id is its own and there is no last will, so that a running daemon is not disturbed.
    """
    stranger = replace(config, client_id=f"iotd-check-{secrets.token_hex(4)}")
    refusal = _refusal(stranger, Protocol.V5)
    if refusal is None:
        return f"MQTT {Protocol.V5}"
    if _refusal(stranger, Protocol.V311) is None:
        return f"MQTT {Protocol.V311}"
    raise Unavailable(refusal)


def _refusal(config: MqttConfig, protocol: Protocol) -> str | None:
    """Why the broker does not let in; None where it does."""
    client = new_client(config, protocol)
    client.will_clear()
    answers: list[ReasonCode] = []

    def connected(
        client: paho.Client, userdata: object, flags: object, reason: ReasonCode, properties: Properties | None
    ) -> None:
        answers.append(reason)

    client.on_connect = connected
    connect(client, config, protocol)
    end_s = time.monotonic() + ANSWER_S
    while not answers and time.monotonic() < end_s and client.loop(0.1) == paho.MQTT_ERR_SUCCESS:
        pass
    client.disconnect()
    if not answers:
        return "it does not speak MQTT, or not over this port"
    return f"it refuses: {answers[0]}" if answers[0].is_failure else None
