"""The configuration is typed, checked as a whole, and every error names the path, the value and what is allowed."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iotd.address import is_loopback, split_address
from iotd.config import Config, load
from iotd.errors import ConfigError
from iotd.topics import is_topic_filter

EXAMPLE = Path(__file__).parents[1] / "deploy" / "iotd.yaml"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "iotd.yaml"
    path.write_text(text)
    return path


def refusal(tmp_path: Path, text: str, env: dict[str, str] | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, text), env or {})
    return caught.value


def test_no_file_and_no_environment_is_all_defaults() -> None:
    assert load(None, {}) == Config()


@pytest.mark.parametrize("text", ["", "# only a comment\n", "mqtt:\n", "mqtt:\n  subscriptions:\n"])
def test_empty_sections_and_keys_take_their_defaults(tmp_path: Path, text: str) -> None:
    assert load(written(tmp_path, text), {}) == Config()


def test_a_file_sets_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    config = load(written(tmp_path, "mqtt:\n  host: broker\n  subscriptions:\n    - topic: home/+/t\n"), {})
    assert (
        config.mqtt.host,
        config.mqtt.port,
        config.mqtt.subscriptions[0].topic,
        config.mqtt.subscriptions[0].kind,
    ) == ("broker", 1883, "home/+/t", "text")


def test_the_example_file_is_valid_and_is_the_defaults() -> None:
    """But for the broker and its subscriptions, which show how they are written."""
    assert load(EXAMPLE, {}).mqtt.subscriptions
    assert load(EXAMPLE, {"IOTD_MQTT__HOST": "", "IOTD_MQTT__SUBSCRIPTIONS": "[]"}) == Config()


def test_the_example_file_names_every_key() -> None:
    from msgspec.structs import fields

    text = EXAMPLE.read_text()
    missing = [
        f"{section.name}.{key.name}"
        for section in fields(Config)
        for key in fields(section.type)
        if f"  {key.name}:" not in text
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("text", "path", "line", "words"),
    [
        ("mqtt:\n  subscriptions:\n    - topic: a\n    - topic: b\n      kind: jpeg\n",
         "mqtt.subscriptions[1].kind", 5, ["'jpeg'", "text, json, image"]),
        ("mqtt:\n  prot: 1\n", "mqtt.prot", 2, ["did you mean port?", "subscriptions"]),
        ("mqqt: {}\n", "mqqt", 1, ["did you mean mqtt?"]),
        ("mqtt:\n  port: 0\n", "mqtt.port", 2, ["0", "at least 1", "65,535"]),
        ("mqtt:\n  port: yes\n", "mqtt.port", 2, ["true", "a whole number"]),
        ("mqtt:\n  host: 3\n", "mqtt.host", 2, ["3", "text"]),
        ("context:\n  window: 100\n", "context.window", 2, ["100", "at least 128"]),
        ("context:\n  window: 128\n  chunk_tokens: 33\n", "context.chunk_tokens", 3, ["33", "window / 4", "32"]),
        ("ask:\n  budget_s: 0\n", "ask.budget_s", 2, ["more than 0"]),
        ("ask:\n  budget_s: .nan\n", "ask.budget_s", 2, ["nan", "a number"]),
        ("ask:\n  budget_s: .inf\n", "ask.budget_s", 2, ["inf", "a number"]),
        ("ask:\n  budget_s: 700\n", "ask.budget_s", 2, ["700", "600"]),
        ("grpc:\n  listen: '50551'\n", "grpc.listen", 2, ["'50551'", "host:port"]),
        ("grpc:\n  listen: 0.0.0.0:1\n", "grpc.listen", 2, ["other machines", "insecure: true"]),
        ("grpc:\n  tls_cert_file: a\n", "grpc.tls_key_file", 1, ["missing"]),
        ("mqtt:\n  subscriptions:\n    - kind: text\n", "mqtt.subscriptions[0].topic", 3, ["missing"]),
        ("mqtt:\n  subscriptions:\n    - topic: a/#/b\n", "mqtt.subscriptions[0].topic", 3, ["'a/#/b'"]),
        ("mqtt:\n  subscriptions: home/#\n", "mqtt.subscriptions", 2, ["'home/#'", "a list"]),
        ("mqtt:\n  subscriptions:\n    - {topic: a, kind: json, fields: {t: 1}}\n",
         "mqtt.subscriptions[0].fields.t", 3, ["1", "text"]),
        ("mqtt:\n  subscriptions:\n    - topic: a\n    - topic: b\n    - topic: a\n",
         "mqtt.subscriptions[2].topic", 5, ["'a'", "mqtt.subscriptions[0]"]),
        ("mqtt:\n  subscriptions:\n    - topic: a/+\n      label: '{1} {2}'\n",
         "mqtt.subscriptions[0].label", 4, ["{2}", "level"]),
        ("log: loud\n", "log", 1, ["'loud'", "level, format"]),
    ],
)  # fmt: skip
def test_an_error_names_path_line_value_and_what_is_allowed(
    tmp_path: Path, text: str, path: str, line: int, words: list[str]
) -> None:
    error = refusal(tmp_path, text)
    assert path == error.field
    assert str(error).startswith(f"{path}: ")
    assert f"line {line})" in str(error)
    assert [word for word in words if word not in str(error)] == []


def test_all_errors_are_told_at_once(tmp_path: Path) -> None:
    lines = str(refusal(tmp_path, "mqtt:\n  port: 0\nlog:\n  level: loud\n")).splitlines()
    assert [line.split(":")[0] for line in lines] == ["mqtt.port", "log.level"]


def test_a_password_in_the_text_is_refused_and_not_repeated(tmp_path: Path) -> None:
    error = refusal(tmp_path, "mqtt:\n  password: hunter2\n")
    assert "password_file" in str(error)
    assert "hunter2" not in str(error)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mqtt:\n  port: 1\n  port: 2\n", ["line 3", "'port'", "twice"]),
        ("mqtt:\n  host: [\n", ["line 3"]),
        ("mqtt: !secret x\n", ["line 1"]),
        ("- a\n", ["mapping of sections", "a list"]),
        ("a: \x01\n", ["iotd.yaml"]),
        ("a: &a [*a]\n", ["alias"]),
        ("a: " + 5000 * "[", ["too deeply"]),
        ("a: " + 5000 * "9", ["value"]),
        ("a: 2026-99-99\n", ["value"]),
        ("a: !!timestamp x\n", ["value"]),
    ],
)
def test_what_is_not_yaml_is_told_with_its_line(tmp_path: Path, text: str, words: list[str]) -> None:
    error = refusal(tmp_path, text)
    assert [word for word in [*words, "iotd.yaml"] if word not in str(error)] == []


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            load(path, {})


def test_a_file_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"mqtt: {host: caf\xe9}")
    with pytest.raises(ConfigError, match="UTF-8"):
        load(path, {})


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    subscriptions = json.dumps([{"topic": "home/#", "kind": "json", "fields": {"t": "°C"}}])
    env = {"IOTD_MQTT__PORT": "1884", "IOTD_MQTT__SUBSCRIPTIONS": subscriptions, "IOTD_TARGET": "x", "HOME": "/"}
    config = load(written(tmp_path, "mqtt: {port: 1, host: b}"), env)
    assert (config.mqtt.port, config.mqtt.host, config.mqtt.subscriptions[0].fields) == (1884, "b", {"t": "°C"})


def test_an_empty_variable_takes_the_default(tmp_path: Path) -> None:
    assert load(written(tmp_path, "mqtt: {port: 1}"), {"IOTD_MQTT__PORT": ""}).mqtt.port == 1883


def test_a_label_may_name_any_level_behind_a_hash(tmp_path: Path) -> None:
    config = load(written(tmp_path, "mqtt: {subscriptions: [{topic: 'a/#', label: '{7}'}]}"), {})
    assert config.mqtt.subscriptions[0].label == "{7}"


def test_text_from_the_environment_needs_no_quotes() -> None:
    assert load(None, {"IOTD_MQTT__NODE": "1e3"}).mqtt.node == "1e3"


@pytest.mark.parametrize(
    ("variable", "text", "words"),
    [
        ("IOTD_MQTT__PORT", "high", ["mqtt.port", "'high'", "IOTD_MQTT__PORT"]),
        ("IOTD_MQTT__PROT", "1", ["mqtt.prot", "did you mean port?", "IOTD_MQTT__PROT"]),
        ("IOTD_MQTT__SUBSCRIPTIONS", "[", ["IOTD_MQTT__SUBSCRIPTIONS", "line 1"]),
        ("IOTD_MQTT__SUBSCRIPTIONS", "&a [*a]", ["IOTD_MQTT__SUBSCRIPTIONS", "alias"]),
        ("IOTD_FOO__BAR", "1", ["foo: unknown key", "IOTD_FOO__BAR"]),
        ("IOTD_MQTT__SUBSCRIPTIONS", "[{topic: a, kind: x}]", ["mqtt.subscriptions[0].kind", "(from IOTD_MQTT__SUB"]),
    ],
)
def test_an_error_from_the_environment_names_the_variable(variable: str, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, {variable: text})
    assert [word for word in words if word not in str(caught.value)] == []


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@given(st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=6))
def test_whatever_a_section_holds_is_taken_or_refused_with_a_path(value: object) -> None:
    text = json.dumps({"mqtt": value})
    try:
        load(None, {"IOTD_MQTT__SUBSCRIPTIONS": text, "IOTD_LOG__LEVEL": text})
    except ConfigError as e:
        assert e.field.startswith(("mqtt.subscriptions", "log.level"))


@pytest.mark.parametrize(
    ("text", "expected"), [("a:1", ("a", 1)), ("[::1]:50551", ("::1", 50551)), ("127.0.0.1:0", ("127.0.0.1", 0))]
)
def test_an_address_is_host_and_port(text: str, expected: tuple[str, int]) -> None:
    assert expected == split_address(text)


@pytest.mark.parametrize("text", ["", "a", ":1", "a:", "a:b", "::1:80", "a:99999", "a b:1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        split_address(text)


def test_loopback_is_this_machine_alone() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.1.2.3", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "192.168.1.2", "pi.local"]))


def test_topic_filters_are_told_from_what_only_looks_like_one() -> None:
    assert all(map(is_topic_filter, ["a", "a/+/b", "#", "a/#", "+", "/", "$share/g/a/#"]))
    assert not any(
        map(is_topic_filter, ["", "a#", "a/#/b", "a+", "$share/g", "$share/+/a", "$share/g/", "a\0", "\ud800"])
    )
