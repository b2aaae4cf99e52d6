"""Which topics the broker shall send, kept so over every connection; and on whose account a message came.

Runs in the session's thread, but for `want`.
"""

import logging
import threading
from collections.abc import Sequence

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from iotd.config import SubscriptionConfig
from iotd.mqtt.dial import Protocol, new_properties
from iotd.mqtt.session import Session

_log = logging.getLogger("iotd.mqtt")


class Subscriber:
    """`settled` is set while the broker has answered for every subscription that is wanted."""

    def __init__(self, subscriptions: Sequence[SubscriptionConfig], own: Sequence[str] = ()) -> None:
        """own: topics of iotd itself, wanted at least once whatever else is."""
        self.settled = threading.Event()
        self._own = dict.fromkeys(own, 1)
        self._wanted = _qos_by_filter(subscriptions) | self._own
        self._have: dict[str, int] = {}
        self._numbers: dict[str, int] = {}
        self._filters: dict[int, str] = {}
        self._numbered = False
        self._unanswered: dict[int, str] = {}

    def want(self, subscriptions: Sequence[SubscriptionConfig]) -> None:
        """From any thread; `sync` carries it out."""
        self._wanted = _qos_by_filter(subscriptions) | self._own
        self.settled.clear()

    def open(self, session: Session, features: Properties) -> None:
        """A new connection: nothing is subscribed yet."""
        self._have.clear()
        self._unanswered.clear()
        self._numbered = session.protocol is Protocol.V5 and bool(
            getattr(features, "SubscriptionIdentifierAvailable", 1)
        )
        session.client.on_subscribe = self._answered
        self.sync(session)

    def closed(self) -> None:
        self.settled.clear()

    def sync(self, session: Session) -> None:
        """Subscribe to what is wanted and new, unsubscribe from what is wanted no more."""
        wanted = self._wanted
        for topic in self._have.keys() - wanted.keys():
            session.client.unsubscribe(topic)
            del self._have[topic]
        for topic, qos in wanted.items():
            if self._have.get(topic) != qos:
                self._subscribe(session, topic, qos)
        self._settle()

    def via(self, message: paho.MQTTMessage) -> tuple[str, ...] | None:
        """The filters on whose account the broker sent this copy; None where it does not say.

        A broker may send a message once for each filter that matches (MQTT 5, 3.3.4), and mosquitto does.
        """
        numbers = getattr(message.properties, "SubscriptionIdentifier", None)
        return tuple(self._filters[n] for n in numbers if n in self._filters) if numbers else None

    def _subscribe(self, session: Session, topic: str, qos: int) -> None:
        if session.protocol is Protocol.V5:
            properties = new_properties(PacketTypes.SUBSCRIBE)
            if self._numbered:
                properties.SubscriptionIdentifier = self._number(topic)
            _, mid = session.client.subscribe(topic, options=SubscribeOptions(qos=qos), properties=properties)
        else:
            _, mid = session.client.subscribe(topic, qos)
        self._have[topic] = qos
        if mid is not None:
            self._unanswered[mid] = topic

    def _number(self, topic: str) -> int:
        number = self._numbers.setdefault(topic, len(self._numbers) + 1)
        self._filters[number] = topic
        return number

    def _answered(
        self, client: paho.Client, userdata: object, mid: int, reasons: list[ReasonCode], properties: Properties | None
    ) -> None:
        topic = self._unanswered.pop(mid, "")
        for reason in reasons:
            if reason.is_failure:
                _log.error("the broker refused the subscription to %s: %s", topic, reason)
        self._settle()

    def _settle(self) -> None:
        if not self._unanswered and self._have.keys() == self._wanted.keys():
            self.settled.set()


def _qos_by_filter(subscriptions: Sequence[SubscriptionConfig]) -> dict[str, int]:
    """At least once for readings; at most once for frames, since the next one is worth more than the last."""
    return {s.topic: 0 if s.kind == "image" else 1 for s in subscriptions}
