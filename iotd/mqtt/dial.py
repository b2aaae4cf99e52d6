"""A paho client as the configuration wants it: identity, credentials, TLS, last will. Connects nothing."""

import ssl
from enum import Enum
from pathlib import Path

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from iotd.config import MqttConfig
from iotd.errors import ConfigError


class Protocol(Enum):
    """The versions spoken; the value is what paho calls them."""

    V5 = paho.MQTTv5
    V311 = paho.MQTTv311

    def __str__(self) -> str:
        return "5" if self is Protocol.V5 else "3.1.1"


def new_client(config: MqttConfig, protocol: Protocol) -> paho.Client:
    """One client for one connection. Raises ConfigError where a file cannot be read.

    Its id is the same at every connection: a broker that still holds a dead one then ends that first, and its last
    will cannot come after the new `online`.
    """
    client = paho.Client(
        CallbackAPIVersion.VERSION2,
        config.client_id or f"iotd-{config.node}",
        clean_session=True if protocol is Protocol.V311 else None,
        protocol=protocol.value,
        # Steps down and reconnects by itself otherwise, without jitter and behind the link's back.
        reconnect_on_failure=False,
    )
    if config.username:
        client.username_pw_set(config.username, read_password(config))
    if (context := tls_context(config)) is not None:
        client.tls_set_context(context)
    client.will_set(availability_topic(config), "offline", qos=1, retain=True)
    return client


def connect(client: paho.Client, config: MqttConfig, protocol: Protocol) -> None:
    """Open the socket and queue CONNECT. Blocks up to paho's 5 s; raises OSError or ValueError.

    The session ends with the connection: what was sent while nobody listened is not news any more.
    """
    if protocol is Protocol.V311:
        client.connect(config.host, config.port, config.keepalive_s)
        return
    properties = new_properties(PacketTypes.CONNECT)
    # Payloads a little too large shall arrive, to be counted; others shall stay at the broker.
    properties.MaximumPacketSize = min(2 * config.max_payload_bytes + 2**20, 2**28)
    client.connect(config.host, config.port, config.keepalive_s, clean_start=True, properties=properties)


def new_properties(packet_type: int) -> Properties:
    """Empty ones, for a packet of this type (paho's PacketTypes)."""
    return Properties(packet_type)  # type: ignore[no-untyped-call]  # paho leaves this class untyped


def base_topic(config: MqttConfig) -> str:
    return f"iotd/{config.node}"


def availability_topic(config: MqttConfig) -> str:
    return f"{base_topic(config)}/availability"


def read_password(config: MqttConfig) -> str | None:
    """The file's first line; read at every connection, so that a changed secret needs no restart."""
    if not config.password_file:
        return None
    try:
        lines = Path(config.password_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(
            f"mqtt.password_file: cannot read {config.password_file}: {e}", field="mqtt.password_file"
        ) from e
    return lines[0] if lines else ""


def tls_context(config: MqttConfig) -> ssl.SSLContext | None:
    if not config.tls:
        return None
    try:
        return ssl.create_default_context(cafile=config.ca_file or None)
    except (OSError, ValueError) as e:
        message = f"mqtt.ca_file: cannot use {config.ca_file} as certificates of an authority: {e}"
        raise ConfigError(message, field="mqtt.ca_file") from e
