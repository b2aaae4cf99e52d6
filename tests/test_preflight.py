"""`iotd check` finds what would keep the daemon from working, and says what to do about it."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from iotd.app import open_engine
from iotd.config import AskConfig, Config, ContextConfig, GrpcConfig, ModelConfig, MqttConfig, SubscriptionConfig
from iotd.engine.backlog import Shot
from iotd.errors import ConfigError, InvalidInput, Unavailable
from iotd.model import Model, package
from iotd.mqtt.probe import probe
from iotd.ops import board, preflight
from iotd.ops.preflight import Finding
from iotd.rpc.listen import check as check_listen


@pytest.fixture
def config(tiny_package: Path) -> Config:
    return Config(model=ModelConfig(path=str(tiny_package)), grpc=GrpcConfig(listen="127.0.0.1:0"))


def no_broker(config: MqttConfig) -> str:
    raise AssertionError("the broker is not to be tried")


def found(config: Config, broker: preflight.Try = no_broker) -> dict[str, Finding]:
    findings = preflight.inspect(config, 2, model=open_engine, listen=check_listen, broker=broker)
    return {finding.name: finding for finding in findings}


def test_all_is_well(config: Config) -> None:
    findings = found(config)
    assert [name for name, finding in findings.items() if not finding.ok or finding.remedy] == []
    assert "2 threads" in findings["model"].text


def test_a_damaged_package_is_found_by_its_hash(config: Config, tiny_package: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny_package.iterdir():
        content = bytearray(path.read_bytes())
        if path.suffix == ".bin":
            content[-1] ^= 1
        (copy / path.name).write_bytes(content)
    model = found(replace(config, model=ModelConfig(path=str(copy))))["model"]
    assert not model.ok
    assert "damaged" in model.text


@pytest.mark.parametrize(("window", "reserve"), [(1_000_000, 1024), (128, 1_000_000)])
def test_more_positions_than_the_model_has_are_found_as_serve_would_refuse_them(
    config: Config, window: int, reserve: int
) -> None:
    config = replace(config, context=ContextConfig(window=window), ask=AskConfig(reserve_tokens=reserve))
    model = found(config)["model"]
    assert (model.ok, model.remedy) == (False, "correct context.window")
    assert "262144" in model.text
    with pytest.raises(ConfigError) as refused:
        open_engine(config)
    assert str(refused.value) == model.text


def test_a_system_prompt_that_is_too_long_is_found_by_its_key(config: Config) -> None:
    model = found(replace(config, context=ContextConfig(window=256, system="Watch the home. " * 99)))["model"]
    assert (model.ok, model.remedy) == (False, "correct context.system")
    assert model.text.startswith("context.system: ")


def test_a_graph_that_cannot_be_opened_is_found(config: Config, tiny_package: Path, tmp_path: Path) -> None:
    """Its hash is right: it was written so."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_package, copy)
    (copy / package.DECODER).write_bytes(b"no graph")
    manifest = json.loads((copy / package.MANIFEST).read_bytes())
    entry = package.hash_file(copy / package.DECODER)
    manifest["files"][package.DECODER] = {"sha256": entry.sha256, "nbytes": entry.nbytes}
    (copy / package.MANIFEST).write_text(json.dumps(manifest))
    model = found(replace(config, model=ModelConfig(path=str(copy))))["model"]
    assert not model.ok
    assert "onnxruntime" in model.text


def test_a_model_that_does_not_fit_is_not_opened(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "available_nbytes", lambda: 1 << 20)
    monkeypatch.setattr(Model, "open", None)
    assert not found(config)["memory"].ok


def test_too_little_free_memory_is_found(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "available_nbytes", lambda: 1 << 20)
    memory = found(config)["memory"]
    assert (memory.ok, memory.remedy) == (False, "set a smaller context.window")


@pytest.mark.parametrize("cameras", [True, False])
def test_a_window_that_no_frame_fits_into_is_told(config: Config, cameras: bool) -> None:
    """It is a problem where there are cameras, and the window that is named is large enough."""
    subscriptions = [SubscriptionConfig(topic="home/camera/+", kind="image", label="{2}")] if cameras else []
    config = replace(config, mqtt=MqttConfig(subscriptions=subscriptions))
    small = ContextConfig(window=128, system="", chunk_tokens=8)
    told = found(replace(config, context=small))["frames"]
    assert told.ok is not cameras
    assert "window of 128 tokens" in told.text
    if cameras:
        least = int(told.remedy.split()[3])
        assert "frames" in found(replace(config, context=replace(small, window=least - 1)))
        assert "frames" not in found(replace(config, context=replace(small, window=least)))


def test_a_frame_fits_into_the_least_window_that_is_told(config: Config) -> None:
    engine = open_engine(replace(config, context=ContextConfig(window=128, system="", chunk_tokens=8)))
    for fits in (False, True):
        window = engine.least_window("door") - 4 * (not fits)
        context = ContextConfig(window=window, system="", chunk_tokens=8)
        lines = open_engine(replace(config, context=context))._lines
        shot = Shot("door", 1.76e9, np.zeros((720, 1280, 3), np.uint8))
        if fits:
            assert lines.frame(shot).n_tokens * 4 <= window
        else:
            with pytest.raises(InvalidInput, match="tokens at least"):
                lines.frame(shot)


def test_tls_files_that_are_none_are_found(config: Config, tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("nonsense")
    tls = GrpcConfig(listen="127.0.0.1:0", tls_cert_file=str(tmp_path / "cert.pem"), tls_key_file=str(tmp_path / "no"))
    finding = found(replace(config, grpc=tls))["grpc"]
    assert not finding.ok
    assert finding.text.startswith("grpc.tls_key_file: ")


def test_a_key_with_a_password_is_found_and_nobody_is_asked_for_it(config: Config, tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    new = f"req -x509 -subj /CN=a -newkey rsa:2048 -passout pass:secret -keyout {key} -out {certificate}"
    subprocess.run(["openssl", *new.split()], check=True, capture_output=True)
    tls = GrpcConfig(listen="127.0.0.1:0", tls_cert_file=str(certificate), tls_key_file=str(key))
    finding = found(replace(config, grpc=tls))["grpc"]
    assert not finding.ok
    assert "unencrypted" in finding.text


def test_an_unreadable_password_file_is_not_taken_for_a_silent_broker(config: Config) -> None:
    mqtt = MqttConfig(host="127.0.0.1", username="a", password_file="/nowhere/password")
    broker = found(replace(config, mqtt=mqtt), probe)["broker"]
    assert (broker.ok, broker.remedy) == (False, "correct mqtt.password_file")
    assert "does not answer" not in broker.text


@pytest.mark.parametrize("error", [ConnectionRefusedError("refused"), Unavailable("it refuses: Not authorized")])
def test_a_broker_that_does_not_let_in_is_found_with_its_reason(config: Config, error: Exception) -> None:
    def refusing(mqtt: MqttConfig) -> str:
        raise error

    broker = found(replace(config, mqtt=MqttConfig(host="broker.lan")), refusing)["broker"]
    assert not broker.ok
    assert str(error) in broker.text
    assert "broker.lan:1883" in broker.text
