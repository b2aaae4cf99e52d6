"""A small publisher, for the simulated home and for checks: no subscription, no last will, MQTT 3.1.1."""

import threading
from types import TracebackType

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from iotd.errors import Unavailable

MAX_WAITING = 256
"""Messages on their way out; further ones are lost, and counted, until the broker takes them."""


class Publisher:
    """A context manager. Reconnects by itself; what is published meanwhile is lost, not kept."""

    def __init__(
        self, host: str, port: int, *, username: str = "", password: str = "", timeout_s: float = 10.0
    ) -> None:
        self._address = (host, port)
        self._timeout_s = timeout_s
        self._client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv311)
        if username:
            self._client.username_pw_set(username, password)
        self._client.reconnect_delay_set(1, 10)
        self._client.on_connect = self._connected
        self._client.on_publish = self._published
        self._answered = threading.Event()
        self._refusal = ""
        self._n_waiting = 0
        self._lock = threading.Lock()

    def __enter__(self) -> "Publisher":
        """Raises Unavailable where the broker does not answer within `timeout_s`, or refuses."""
        host, port = self._address
        try:
            self._client.connect(host, port)
        except (OSError, ValueError) as e:
            raise Unavailable(f"no MQTT broker at {host}:{port}: {e}") from e
        self._client.loop_start()
        if not self._answered.wait(self._timeout_s) or self._refusal:
            self.__exit__(None, None, None)
            raise Unavailable(f"the MQTT broker at {host}:{port} {self._refusal or 'gives no answer'}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def publish(self, topic: str, payload: str | bytes, *, retain: bool = False) -> bool:
        """Send, at most once. False where it was lost: no connection, or too much is waiting already."""
        with self._lock:
            if self._n_waiting >= MAX_WAITING or not self._client.is_connected():
                return False
            self._n_waiting += 1
        if self._client.publish(topic, payload, qos=0, retain=retain).rc == paho.MQTT_ERR_SUCCESS:
            return True
        self._published(self._client, None, 0, None, None)
        return False

    def _connected(
        self, client: paho.Client, userdata: object, flags: object, reason: ReasonCode, properties: Properties | None
    ) -> None:
        with self._lock:
            self._n_waiting = 0
        self._refusal = f"refused: {reason}" if reason.is_failure else ""
        self._answered.set()

    def _published(
        self, client: paho.Client, userdata: object, mid: int, reason: ReasonCode | None, properties: Properties | None
    ) -> None:
        with self._lock:
            self._n_waiting = max(0, self._n_waiting - 1)
