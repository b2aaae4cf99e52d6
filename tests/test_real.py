"""The real Qwen3.5 files without weights: configurations, tensor names, tokenizer, chat templates and their ids.

IOTD_SHARED names the folder they lie in.
"""

import gzip
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from checkpoints import BFLOAT16, INDEX, copy_checkpoint, edit_json, edit_tensors
from numpy.typing import NDArray

from iotd.convert.chat import CHATML, compile_chat
from iotd.convert.checkpoint import Checkpoint, canonical_name
from iotd.convert.convert import RECIPES, convert_checkpoint
from iotd.convert.decoder import DecoderWriter
from iotd.convert.graph import GraphWriter
from iotd.convert.random import random_config
from iotd.convert.rounding import Nearest
from iotd.convert.spec import spec_from_config
from iotd.convert.tokenizer import compile_tokenizer
from iotd.convert.vision import VisionWriter
from iotd.convert.weights import CheckpointWeights, Floats, Matrix
from iotd.errors import InvalidInput
from iotd.model import Model
from iotd.model.chat import ChatTemplate
from iotd.model.package import TableEntry
from iotd.model.tokenizer import Tokenizer

REAL = Path(os.environ.get("IOTD_SHARED", "/nowhere")) / "real"
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="IOTD_SHARED names no folder with the real files")
TEMPLATES = {"0.8B": "chat_template.0.8B-2B.jinja", "4B": "chat_template.4B-9B.jinja"}
UNSLOTH = "unsloth-0.8B.reconstructed.jinja"
SIZES = {"0.8B": True, "2B": True, "4B": True, "9B": False}
"""Whether the head is the embedding."""
N_MTP = 15
ROUNDING = Nearest(RECIPES["int4"])


def load(name: str) -> Any:
    path = REAL / name
    return json.loads(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("real") / "tokenizer.bin"
    compile_tokenizer(load("tokenizer.json.gz"), path)
    return Tokenizer.open(path)


def chat_of(template: str, folder: Path) -> ChatTemplate:
    shutil.copyfile(REAL / template, folder / "chat_template.jinja")
    return compile_chat(folder)


def test_every_string_has_the_ids_of_the_real_tokenizer(tokenizer: Tokenizer) -> None:
    """As plain text, in which control tokens are characters, and with them."""
    strings = [json.loads(line) for line in gzip.decompress((REAL / "tokens.jsonl.gz").read_bytes()).splitlines()]
    assert len(strings) == 1120
    for string in strings:
        assert string["plain"] == tokenizer.encode(string["text"]), string["text"]
        assert string["with_control_tokens"] == tokenizer.encode(string["text"], special=True), string["text"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_conversation_has_the_text_and_ids_of_transformers(
    template: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """A conversation that does not say whether to think takes its template's own choice."""
    chat = chat_of(TEMPLATES[template], tmp_path)
    assert chat == CHATML
    conversations = [each for each in load("chats.json") if each["template"] == template]
    assert len(conversations) == 27
    for each in conversations:
        thinking = template == "4B" if each["enable_thinking"] is None else each["enable_thinking"]
        runs = chat.tokenize(chat.render(with_pictures(each["messages"]), thinking), tokenizer)
        pad = [tokenizer.token_id("<|image_pad|>")]
        ids = [token for run in runs for token in (run if isinstance(run, list) else pad)]
        assert each["ids"] == ids, each["name"]
        assert each["text"] == b"".join(map(tokenizer.token_bytes, ids)).decode(), each["name"]


def with_pictures(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose images carry something, as ours do."""
    return [
        {**message, "content": [{**part, "image": "picture"} if part["type"] == "image" else part for part in content]}
        if isinstance(content := message["content"], list)
        else message
        for message in messages
    ]


def test_a_template_that_leaves_out_an_empty_system_message_converts(tmp_path: Path) -> None:
    """That conversation alone is refused, and a stream without a system prompt is as ever."""
    chat = chat_of(UNSLOTH, tmp_path)
    assert chat.refused == ("an empty system message",)
    user = {"role": "user", "content": "Is any door open?"}
    with pytest.raises(InvalidInput, match="an empty system message"):
        chat.render([{"role": "system", "content": ""}, user])
    for messages in ([user], [{"role": "system", "content": "S"}, user, {"role": "assistant", "content": "No."}, user]):
        assert str(CHATML.render(messages)) == str(chat.render(messages))
    assert str(CHATML.open_stream()) == str(chat.open_stream())


def without_content(folder: Path, size: str) -> Path:
    """A checkpoint of the real names and shapes, in one shard of nothing but holes, which take no space."""
    names: dict[str, list[int]] = load(f"tensors.{size}.json")
    header, at = {}, 0
    for name, shape in names.items():
        nbytes = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    encoded = json.dumps(header).encode()
    shard = folder / "model.safetensors-00001-of-00001.safetensors"
    with shard.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + at)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, shard.name)}))
    shutil.copyfile(REAL / f"config.{size}.json", folder / "config.json")
    shutil.copyfile(REAL / "preprocessor_config.json", folder / "preprocessor_config.json")
    return folder


class Asked(CheckpointWeights):
    """Remembers the tensors that were asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint, lambda _: None)
        self.names: set[str] = set()

    def tensor(self, name: str, *shape: int) -> Floats:
        self.names.add(name)
        return super().tensor(name, *shape)

    def matrix(self, name: str, rows: int, columns: int, *, again: bool = False) -> Matrix:
        self.names.add(name)
        return super().matrix(name, rows, columns, again=again)


class Unwritten(GraphWriter):
    """Leaves the weights out."""

    def table(self, name: str, weight: Matrix) -> TableEntry:
        return self._entry(self._rounding.grid(name), 0, 0)

    def _write(self, values: NDArray[Any]) -> int:
        return 0


@pytest.mark.parametrize(("size", "tied"), SIZES.items())
def test_every_real_tensor_is_asked_for_by_its_name_and_shape(size: str, tied: bool, tmp_path: Path) -> None:
    """All but those of multi-token prediction, and no other: what is missing or misshapen raises an error."""
    checkpoint = Checkpoint(without_content(tmp_path, size))
    spec = spec_from_config(checkpoint.config, checkpoint.folder, tied=tied, vision=True)
    weights = Asked(checkpoint)
    with Unwritten(tmp_path / "decoder.onnx", ROUNDING) as graph:
        DecoderWriter(graph, spec, weights).write()
    assert spec.vision is not None
    with Unwritten(tmp_path / "vision.onnx", Nearest(RECIPES["fp32"])) as graph:
        VisionWriter(graph, spec.vision, spec.hidden_size, weights).write()
    for name in ("text.embed_tokens.weight", *(() if tied else ("head.weight",))):
        weights.matrix(name, spec.vocab_size, spec.hidden_size)
    stored = [canonical_name(name) for name in load(f"tensors.{size}.json")]
    assert stored.count(None) == N_MTP
    assert {*stored} - {None} == weights.names
    assert (spec.vision.min_pixels, spec.vision.max_pixels) == (65_536, 16_777_216)
    made_up = spec_from_config(random_config(size.lower()), None, tied=tied, vision=True)
    assert made_up == msgspec.structs.replace(spec, eos_token_ids=made_up.eos_token_ids)


def test_a_small_model_behind_the_real_tokenizer_converts_and_answers(tmp_path: Path) -> None:
    """With the real configuration's ids, chat template and image processor; its turns end as the template has them."""
    folder = copy_checkpoint(tmp_path / "checkpoint")
    config = load("config.0.8B.json")
    vocab_size = config["text_config"]["vocab_size"]
    embedding = "model.language_model.embed_tokens.weight"

    def enlarge(tensors: dict[str, NDArray[Any]]) -> None:
        shape = (vocab_size, tensors[embedding].shape[1])
        tensors[embedding] = np.random.default_rng(0).standard_normal(shape, np.float32).astype(BFLOAT16)

    def name_ids(own: dict[str, Any]) -> None:
        own["text_config"] |= {"vocab_size": vocab_size, "eos_token_id": config["text_config"]["eos_token_id"]}
        own.pop("eos_token_id", None)
        own |= {name: value for name, value in config.items() if name.endswith("_token_id")}

    edit_tensors(folder, enlarge)
    edit_json(folder / "config.json", name_ids)
    (folder / "generation_config.json").unlink()  # none of the real ones has it
    (folder / "tokenizer.json").write_bytes(gzip.decompress((REAL / "tokenizer.json.gz").read_bytes()))
    shutil.copyfile(REAL / "preprocessor_config.json", folder / "preprocessor_config.json")
    shutil.copyfile(REAL / TEMPLATES["0.8B"], folder / "chat_template.jinja")
    convert_checkpoint(folder, tmp_path / "package")
    model = Model.open(tmp_path / "package", threads=1)
    assert model.spec.eos_token_ids == (248044, 248046)
    image = np.zeros((64, 64, 3), np.uint8)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Who is there?"}]
    assert "".join(model.generate([{"role": "user", "content": content}], max_tokens=4, seed=0))
