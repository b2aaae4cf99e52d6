"""The server's port, TLS, health, reflection and the order of its stopping."""

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from patience import PATIENCE_S
from scripted_engine import STATUS, Daemon, channel, decode_image, running

from iotd.client import Client
from iotd.config import AskConfig, GrpcConfig
from iotd.errors import ConfigError, Unavailable
from iotd.events import ServingState
from iotd.rpc import Server
from iotd.v1 import iotd_pb2, iotd_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
QUESTION = iotd_pb2.AskRequest(question="Is a door open?")


def server(config: GrpcConfig) -> Server:
    return Server(None, lambda: STATUS, config, decode_image=decode_image)


@contextmanager
def stub(daemon: Daemon) -> Iterator[Any]:
    with channel(daemon) as opened:
        yield iotd_pb2_grpc.IotdStub(opened)


def refusal(answer: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        list(answer)
    return caught.value


@pytest.mark.parametrize("name", ["", "iotd.v1.Iotd"])
def test_health_is_not_serving_while_loading_and_while_draining(name: str) -> None:
    with running(serving=False) as daemon, channel(daemon) as opened:
        health = health_pb2_grpc.HealthStub(opened)
        states = health.Watch(health_pb2.HealthCheckRequest(service=name), timeout=PATIENCE_S)
        assert next(states).status == NOT_SERVING
        daemon.set_serving(True)
        assert next(states).status == SERVING
        assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == SERVING
        daemon.set_serving(False)
        assert next(states).status == NOT_SERVING


def test_health_can_go_and_come_while_questions_are_taken() -> None:
    with running() as daemon, channel(daemon) as opened:
        states = health_pb2_grpc.HealthStub(opened).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert next(states).status == SERVING
        for healthy, expected in ((False, NOT_SERVING), (True, SERVING)):
            daemon.set_health(healthy)
            assert next(states).status == expected
            assert daemon.server.state is ServingState.SERVING


def test_asks_are_unavailable_while_loading_and_while_draining() -> None:
    with running(serving=False) as daemon, stub(daemon) as iotd:
        assert daemon.server.state is ServingState.LOADING
        loading = refusal(iotd.Ask(QUESTION))
        daemon.set_serving(True)
        daemon.set_serving(False)
        assert daemon.server.state is ServingState.DRAINING
        draining = refusal(iotd.Ask(QUESTION))
    assert loading.code() is draining.code() is grpc.StatusCode.UNAVAILABLE
    assert "loading" in loading.details()
    assert "stopping" in draining.details()


def test_an_engine_may_come_after_the_server() -> None:
    with running(attached=False) as daemon, stub(daemon) as iotd:
        assert refusal(iotd.Ask(QUESTION)).code() is grpc.StatusCode.UNAVAILABLE
        daemon.server.attach(daemon.engine)
        answer = iotd.Ask(QUESTION)
        daemon.engine.next().finish()
        assert list(answer)[-1].HasField("done")


def test_new_limits_hold_for_the_asks_that_follow() -> None:
    with running() as daemon, stub(daemon) as iotd:
        daemon.server.reconfigure(AskConfig(max_tokens=3))
        _call = iotd.Ask(QUESTION)
        assert daemon.engine.next().ask.sampling.max_tokens == 3


def test_status_is_answered_while_loading() -> None:
    with running(serving=False) as daemon, stub(daemon) as iotd:
        response = iotd.GetStatus(iotd_pb2.GetStatusRequest())
    assert response.version == "1.2.3"
    assert response.state == iotd_pb2.SERVING_STATE_SERVING
    assert response.context.oldest_event_time.ToNanoseconds() == 1_700_000_000_250_000_000
    assert response.resident_memory_bytes == 5_000_000_000
    assert dict(response.mqtt.counters) == {"messages": 9, "readings": 5}


def test_a_status_that_cannot_be_told_is_internal() -> None:
    def broken() -> Any:
        raise ZeroDivisionError

    with running(status=broken) as daemon, stub(daemon) as iotd, pytest.raises(grpc.RpcError) as caught:
        iotd.GetStatus(iotd_pb2.GetStatusRequest())
    assert caught.value.code() is grpc.StatusCode.INTERNAL


def test_stopping_waits_for_the_open_answer() -> None:
    with running() as daemon, stub(daemon) as iotd:
        answer = iotd.Ask(QUESTION)
        ticket = daemon.engine.next()
        ticket.say("Yes")
        assert next(answer).HasField("accepted")
        assert next(answer).delta.text == "Yes"
        stopped = daemon.submit(daemon.server.stop(PATIENCE_S))
        assert refusal(iotd.Ask(QUESTION)).code() is grpc.StatusCode.UNAVAILABLE
        assert not stopped.done()
        ticket.finish()
        assert next(answer).HasField("done")
        stopped.result(PATIENCE_S)


def test_stopping_ends_what_outlasts_its_grace_as_unavailable() -> None:
    with running() as daemon, stub(daemon) as iotd:
        answer = iotd.Ask(QUESTION)
        ticket = daemon.engine.next()
        daemon.run(daemon.server.stop(0.05))
        error = refusal(answer)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "stopping" in error.details()
    assert ticket.cancelled.is_set()


def test_a_health_watcher_does_not_hold_up_stopping() -> None:
    with running() as daemon, channel(daemon) as opened:
        states = health_pb2_grpc.HealthStub(opened).Watch(health_pb2.HealthCheckRequest())
        assert next(states).status == SERVING
        daemon.run(daemon.server.stop(0.0))


def test_reflection_tells_the_services_and_their_fields() -> None:
    with running() as daemon, channel(daemon) as opened:
        known = ProtoReflectionDescriptorDatabase(opened)
        services = set(known.get_services())
        file = known.FindFileContainingSymbol("iotd.v1.Iotd")
    assert services >= {"iotd.v1.Iotd", "grpc.health.v1.Health"}
    assert [method.name for method in file.service[0].method] == ["Ask", "Classify", "GetStatus"]


def test_reflection_can_be_turned_off() -> None:
    with running(GrpcConfig(listen="127.0.0.1:0", reflection=False)) as daemon, channel(daemon) as opened:
        error = refusal(ProtoReflectionDescriptorDatabase(opened).get_services() for _ in "1")
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_message_over_the_configured_size_is_refused() -> None:
    with running(GrpcConfig(listen="127.0.0.1:0", max_message_bytes=1000)) as daemon, stub(daemon) as iotd:
        error = refusal(iotd.Ask(iotd_pb2.AskRequest(question="why?", images=[b"x" * 2000])))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.168.1.20:50551", "pi.local:50551"])
def test_other_addresses_than_loopback_need_tls_or_insecure(listen: str) -> None:
    with pytest.raises(ConfigError, match="insecure: true") as caught:
        server(GrpcConfig(listen=listen))
    assert caught.value.field == "grpc.listen"


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:0"])
def test_loopback_needs_neither(listen: str) -> None:
    with running(GrpcConfig(listen=listen)) as daemon:
        assert daemon.port > 0


def test_insecure_allows_any_address() -> None:
    with running(GrpcConfig(listen="0.0.0.0:0", insecure=True)) as daemon, stub(daemon) as iotd:
        assert iotd.GetStatus(iotd_pb2.GetStatusRequest()).version == "1.2.3"


@pytest.mark.parametrize("listen", ["", "50551", ":50551", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:65536"])
def test_an_address_that_is_none_is_refused(listen: str) -> None:
    with pytest.raises(ConfigError, match="use host:port") as caught:
        server(GrpcConfig(listen=listen))
    assert caught.value.field == "grpc.listen"


def test_a_port_in_use_is_said_to_be_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        listen = f"127.0.0.1:{other.getsockname()[1]}"
        in_use = pytest.raises(ConfigError, match="Address already in use: is another iotd running")
        with in_use as caught, running(GrpcConfig(listen=listen)):
            pass
    assert caught.value.field == "grpc.listen"


def test_two_daemons_do_not_share_a_port() -> None:
    in_use = pytest.raises(ConfigError, match="already in use")
    with running() as first, in_use, running(GrpcConfig(listen=first.target)):
        pass


def test_an_address_of_another_machine_is_said_to_be_so() -> None:
    not_ours = pytest.raises(ConfigError, match="Cannot assign requested address")
    with not_ours, running(GrpcConfig(listen="192.0.2.1:50551", insecure=True)):
        pass


class Pki:
    """An authority, and what it signed: made with the openssl command."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.ca = self._authority("ca")
        self.other_ca = self._authority("other")
        self.server = self._signed("server", "ca")
        self.client = self._signed("client", "ca")
        self.stranger = self._signed("stranger", "other")

    def path(self, name: str) -> str:
        return str(self._folder / name)

    def _authority(self, name: str) -> str:
        self._openssl(f"req -x509 -subj /CN={name} -keyout {name}.key -out {name}.pem {_NEW_KEY}")
        return self.path(f"{name}.pem")

    def _signed(self, name: str, ca: str) -> tuple[str, str]:
        self._openssl(
            f"req -x509 -subj /CN={name} -addext subjectAltName=DNS:localhost,IP:127.0.0.1 "
            f"-addext basicConstraints=critical,CA:FALSE -CA {ca}.pem -CAkey {ca}.key "
            f"-keyout {name}.key -out {name}.pem {_NEW_KEY}"
        )
        return self.path(f"{name}.pem"), self.path(f"{name}.key")

    def _openssl(self, arguments: str) -> None:
        subprocess.run(["openssl", *arguments.split()], cwd=self._folder, check=True, capture_output=True)


_NEW_KEY = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


def tls_config(pki: Pki, **more: Any) -> GrpcConfig:
    certificate, key = pki.server
    return GrpcConfig(**{"listen": "127.0.0.1:0", "tls_cert_file": certificate, "tls_key_file": key, **more})


def status_over_tls(daemon: Daemon, ca: str, identity: tuple[str, str] | None = None) -> str:
    certificate, key = (Path(path).read_bytes() for path in identity) if identity else (None, None)
    credentials = grpc.ssl_channel_credentials(Path(ca).read_bytes(), key, certificate)
    with grpc.secure_channel(daemon.target, credentials) as opened:
        response = iotd_pb2_grpc.IotdStub(opened).GetStatus(iotd_pb2.GetStatusRequest(), timeout=PATIENCE_S)
        return str(response.version)


def test_tls_serves_who_trusts_its_authority(pki: Pki) -> None:
    with running(tls_config(pki, listen="0.0.0.0:0")) as daemon:
        assert status_over_tls(daemon, pki.ca) == "1.2.3"
        with pytest.raises(grpc.RpcError) as distrust:
            status_over_tls(daemon, pki.other_ca)
        with stub(daemon) as plain, pytest.raises(grpc.RpcError) as clear_text:
            plain.GetStatus(iotd_pb2.GetStatusRequest(), timeout=PATIENCE_S)
    assert distrust.value.code() is clear_text.value.code() is grpc.StatusCode.UNAVAILABLE


def test_mutual_tls_serves_only_whom_its_authority_signed(pki: Pki) -> None:
    with running(tls_config(pki, tls_client_ca_file=pki.ca)) as daemon:
        assert status_over_tls(daemon, pki.ca, pki.client) == "1.2.3"
        for identity in (None, pki.stranger):
            with pytest.raises(grpc.RpcError) as caught:
                status_over_tls(daemon, pki.ca, identity)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_the_client_shows_its_certificate_and_checks_the_servers(pki: Pki) -> None:
    certificate, key = pki.client
    with running(tls_config(pki, tls_client_ca_file=pki.ca)) as daemon:
        with Client(daemon.target, ca_file=pki.ca, cert_file=certificate, key_file=key) as known:
            assert known.status() == STATUS
        with Client(daemon.target, ca_file=pki.ca) as unknown, pytest.raises(Unavailable, match="TLS settings"):
            unknown.status()


def test_tls_files_that_do_not_fit_are_named(pki: Pki, tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    wrong = [
        ({"tls_key_file": ""}, "grpc.tls_key_file"),
        ({"tls_cert_file": ""}, "grpc.tls_cert_file"),
        ({"tls_cert_file": "/nowhere/cert.pem"}, "grpc.tls_cert_file"),
        ({"tls_key_file": pki.client[1]}, "grpc.tls_cert_file"),
        ({"tls_cert_file": str(empty)}, "grpc.tls_cert_file"),
        ({"tls_client_ca_file": str(empty)}, "grpc.tls_client_ca_file"),
        ({"tls_client_ca_file": pki.ca, "tls_cert_file": "", "tls_key_file": ""}, "grpc.tls_client_ca_file"),
    ]
    for change, field in wrong:
        with pytest.raises(ConfigError, match=r"grpc\.tls_") as caught:
            server(tls_config(pki, **change))
        assert caught.value.field == field, change
