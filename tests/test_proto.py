"""The committed stubs are those of the committed proto."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import json_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from patience import PATIENCE_S

from iotd.v1 import iotd_pb2

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "iotd" / "v1"


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stubs")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        [ROOT / "proto" / "generate", folder], check=True, timeout=PATIENCE_S, env={**os.environ, "PATH": path}
    )
    return folder / "iotd" / "v1"


def without_version(stub: str) -> str:
    """What remains when the generator's version, and the wording that changes with it, is taken out."""
    stub = re.sub(r"(?<=Protobuf Python Version: )[\d.]+|(?<=GRPC_GENERATED_VERSION = ')[\d.]+", "", stub)
    stub = re.sub(r"(?<=_runtime_version.Domain.PUBLIC,)(\s+\d+,){3}", "", stub)
    return stub.replace("_Optional[bool]", "bool").replace("(object)", "")


@pytest.mark.parametrize("name", ["iotd_pb2.py", "iotd_pb2.pyi", "iotd_pb2_grpc.py"])
def test_the_committed_stubs_are_those_of_the_proto(generated: Path, name: str) -> None:
    """Run proto/generate where this fails."""
    assert without_version((COMMITTED / name).read_text()) == without_version((generated / name).read_text())


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> FileDescriptorProto:
    path = tmp_path_factory.mktemp("descriptor") / "iotd.pb"
    arguments = ["-I", ROOT / "proto", "--include_source_info", f"--descriptor_set_out={path}", "iotd/v1/iotd.proto"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *arguments], check=True, timeout=PATIENCE_S)
    return FileDescriptorSet.FromString(path.read_bytes()).file[0]


def test_every_part_of_the_proto_has_a_comment(described: FileDescriptorProto) -> None:
    commented = {tuple(place.path) for place in described.source_code_info.location if place.leading_comments.strip()}
    parts = [(6, 0), (6, 0, 2, 0), (6, 0, 2, 1)]
    for m, message in enumerate(described.message_type):
        parts += [(4, m), *((4, m, 2, f) for f in range(len(message.field)))]
    for e, enum in enumerate(described.enum_type):
        parts += [(5, e), *((5, e, 2, v) for v in range(len(enum.value)))]
    assert [part for part in parts if part not in commented] == []


def test_every_enum_begins_with_its_unspecified_value(described: FileDescriptorProto) -> None:
    for enum in described.enum_type:
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper()
        assert (enum.value[0].name, enum.value[0].number) == (f"{prefix}_UNSPECIFIED", 0)
        assert all(value.name.startswith(prefix) for value in enum.value)


def test_a_request_in_json_has_lower_camel_case_names_and_a_plain_budget() -> None:
    request = json_format.Parse(
        '{"question": "why?", "budget": "2.5s", "useContext": false, "sampling": {"topK": 3}}', iotd_pb2.AskRequest()
    )
    assert request.budget.ToMilliseconds() == 2500
    assert request.HasField("use_context")
    assert request.sampling.top_k == 3
