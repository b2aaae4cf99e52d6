"""The link with brokers of other manners: MQTT 3.1.1 only, with passwords, with TLS, and with nothing to say."""

import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from broker import Linked, MakeLink, MakeMosquitto, until
from patience import PATIENCE_S

from iotd.config import MqttConfig
from iotd.demo.broker import Amqtt, embedded_broker
from iotd.errors import ConfigError, Unavailable
from iotd.events import Reading
from iotd.mqtt import Link
from iotd.mqtt.publisher import Publisher

pytest_plugins = ("broker",)


def test_it_steps_down_to_3_1_1_where_the_broker_refuses_5(link: MakeLink) -> None:
    with Amqtt() as broker:
        linked = link(broker.port).connected()
        assert linked.link.status().protocol == "3.1.1"
        with Publisher(broker.host, broker.port) as publisher:
            publisher.publish("home/a/temperature", "3")
            event = linked.next()
        linked.link.stop()
    assert isinstance(event, Reading)
    assert event.text == "3 °C"


class Mute:
    """A server that closes every connection after the first bytes: an old broker that gives no CONNACK to MQTT 5."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.levels: list[int] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with connection:
                packet = connection.recv(1000)
                # The protocol's level stands behind the four letters of its name.
                self.levels.append(packet[packet.index(b"MQTT") + 4])

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(PATIENCE_S)


def test_a_broker_that_only_closes_is_asked_in_both_versions(link: MakeLink) -> None:
    mute = Mute()
    linked = link(mute.port)
    until(lambda: len(mute.levels) >= 4)
    assert not linked.link.status().connected
    linked.link.stop()
    mute.close()
    assert mute.levels[:4] == [5, 4, 5, 4]


@pytest.fixture
def passwords(tmp_path: Path) -> Path:
    """A mosquitto password file that lets `iotd` in with `secret`."""
    path = tmp_path / "passwords"
    path.write_text("iotd:secret\n")
    path.chmod(0o600)
    tool = shutil.which("mosquitto_passwd")
    assert tool, "mosquitto_passwd comes with Debian's package mosquitto"
    subprocess.run([tool, "-U", str(path)], check=True)
    return path


def test_a_name_and_a_password_from_a_file_let_it_in(
    make_mosquitto: MakeMosquitto, passwords: Path, link: MakeLink, tmp_path: Path
) -> None:
    broker = make_mosquitto(f"allow_anonymous false\npassword_file {passwords}")
    secret = tmp_path / "secret"
    secret.write_text("secret\n")
    linked = link(broker.port, username="iotd", password_file=str(secret)).connected()
    with Publisher(broker.host, broker.port, username="iotd", password="secret") as publisher:
        publisher.publish("home/a/temperature", "3")
        assert isinstance(linked.next(), Reading)


def test_a_wrong_password_is_logged_and_tried_again_until_it_is_mended(
    make_mosquitto: MakeMosquitto, passwords: Path, link: MakeLink, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = make_mosquitto(f"allow_anonymous false\npassword_file {passwords}")
    secret = tmp_path / "secret"
    secret.write_text("wrong")
    linked = link(broker.port, username="iotd", password_file=str(secret))
    until(lambda: "refused: Not authorized" in caplog.text or "refused: Bad user name" in caplog.text)
    assert not linked.link.status().connected
    secret.write_text("secret")
    linked.connected()
    lines = [record for record in caplog.records if "refused" in record.message]
    assert len(lines) == 1


def test_a_file_that_cannot_be_read_is_a_configuration_error(tmp_path: Path) -> None:
    not_certificates = tmp_path / "ca.pem"
    not_certificates.write_text("hello")
    for field, config in (
        ("mqtt.password_file", MqttConfig(host="x", username="u", password_file=str(tmp_path / "none"))),
        ("mqtt.ca_file", MqttConfig(host="x", tls=True, ca_file=str(tmp_path / "none"))),
        ("mqtt.ca_file", MqttConfig(host="x", tls=True, ca_file=str(not_certificates))),
    ):
        with pytest.raises(ConfigError) as refused:
            Link(config, print)
        assert refused.value.field == field


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    tool = shutil.which("openssl")
    assert tool, "openssl is needed for this test (Debian: apt install openssl)"
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [tool, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=iotd", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return cert, key


def test_tls_with_the_authority_it_trusts(
    make_mosquitto: MakeMosquitto, certificate: tuple[Path, Path], link: MakeLink
) -> None:
    cert, key = certificate
    broker = make_mosquitto(f"allow_anonymous true\ncertfile {cert}\nkeyfile {key}")
    linked = link(broker.port, tls=True, ca_file=str(cert)).connected()
    assert linked.link.status().protocol == "5"


# paho leaves the socket of a failed handshake to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tls_with_an_authority_it_does_not_trust_is_refused(
    make_mosquitto: MakeMosquitto, certificate: tuple[Path, Path], link: MakeLink, caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = certificate
    broker = make_mosquitto(f"allow_anonymous true\ncertfile {cert}\nkeyfile {key}")
    linked = link(broker.port, tls=True)
    until(lambda: "CERTIFICATE_VERIFY_FAILED" in caplog.text)
    assert not linked.link.status().connected


def test_a_publisher_says_what_is_wrong_with_its_broker(make_mosquitto: MakeMosquitto, passwords: Path) -> None:
    broker = make_mosquitto(f"allow_anonymous false\npassword_file {passwords}")
    with pytest.raises(Unavailable, match="refused"), Publisher(broker.host, broker.port):
        pass
    broker.close()
    with pytest.raises(Unavailable, match="no MQTT broker at"), Publisher(broker.host, broker.port):
        pass


@pytest.mark.parametrize("kind", ["mosquitto", "amqtt"])
def test_the_embedded_broker_serves_and_ends(kind: str, link: MakeLink) -> None:
    before = set(threading.enumerate())
    with embedded_broker(kind) as broker:
        assert broker.kind == kind
        with Linked(broker.port) as linked, Publisher(broker.host, broker.port) as publisher:
            linked.connected()
            publisher.publish("home/a/temperature", "3")
            assert isinstance(linked.next(), Reading)
    assert set(threading.enumerate()) == before
    with pytest.raises(OSError):
        socket.create_connection((broker.host, broker.port), timeout=1)
