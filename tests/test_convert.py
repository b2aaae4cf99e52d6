"""Conversion: what it takes, what it refuses and how it says so, and that a package is there whole or not at all."""

import errno
import json
import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    BFLOAT16,
    INDEX,
    SINGLE,
    Tensors,
    copy_checkpoint,
    edit_json,
    edit_tensors,
    shard,
    text_only,
    truncate,
)

from iotd.convert import convert, graph, weights
from iotd.convert.checkpoint import Checkpoint
from iotd.convert.convert import convert_checkpoint, convert_random
from iotd.convert.random import special_tokens
from iotd.errors import CheckpointError, InvalidInput
from iotd.model import Model
from iotd.model.tokenizer import Tokenizer

TEXT, VISION = "model.language_model.", "model.visual."
DOWN = TEXT + "layers.1.mlp.down_proj.weight"
TOKENS = [1, 5, 9, 200, 7]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return copy_checkpoint(tmp_path / "checkpoint")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(checkpoint: Path, recipe: str = "fp32", **options: Any) -> str:
    """What a conversion says that must fail, leaving everything around it as it was."""
    out = checkpoint.parent / "out"
    before = contents(checkpoint.parent), set(checkpoint.parent.iterdir())
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(checkpoint, out, recipe=recipe, **options)
    assert (contents(checkpoint.parent), set(checkpoint.parent.iterdir())) == before
    said = str(caught.value)
    assert said and "\n" not in said and len(said) < 400
    return said


def logits(checkpoint: Path, out: Path, **options: Any) -> np.ndarray:
    convert_checkpoint(checkpoint, out, recipe="fp32", **options)
    model = Model.open(out, threads=1)
    return model.prefill(model.new_state(16), TOKENS)


def config(**changes: Any) -> Callable[[Path], None]:
    """Change keys of config.json; `text_config__x` is x of text_config, None takes the key away."""

    def change(document: dict[str, Any]) -> None:
        for path, value in changes.items():
            *sections, key = path.split("__")
            section = document
            for name in sections:
                section = section[name]
            if value is None:
                del section[key]
            else:
                section[key] = value

    return lambda folder: edit_json(folder / "config.json", change)


def tensor(name: str, change: Callable[[np.ndarray], np.ndarray | None]) -> Callable[[Path], None]:
    """Change one tensor; None takes it away."""

    def edit(tensors: Tensors) -> None:
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed

    return lambda folder: edit_tensors(folder, edit)


def text(name: str, content: bytes | None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)

    return write


def rename_key(folder: Path, key: str, other: str) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({other: index["weight_map"].pop(key)}))


def with_nan(values: np.ndarray) -> np.ndarray:
    values[-1, -1] = np.nan
    return values


def with_infinity(values: np.ndarray) -> np.ndarray:
    values[0, 3] = -np.inf
    return values


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (text("config.json", None), r"config\.json: No such file"),
    "config is no JSON": (text("config.json", b"{"), r"config\.json is not JSON"),
    "config is no UTF-8": (text("config.json", b'{"a": "\xff"}'), r"config\.json is not JSON"),
    "config is no object": (text("config.json", b"[]"), r"config\.json holds a list"),
    "another model": (config(model_type="qwen2"), r"model_type 'qwen2' .*Qwen3\.5"),
    "no model type": (config(model_type=None), "model_type None"),
    "already quantised": (config(quantization_config={"quant_method": "fp8"}), r"already quantised \(fp8\)"),
    "no text_config": (config(text_config=None), r"config\.json lacks text_config"),
    "text_config is a list": (config(text_config=[1]), r"text_config = \[1\]"),
    "no vision_config's key": (config(vision_config__depth=None), "vision_config of config.json lacks depth"),
    "vision_config is a word": (config(vision_config="yes"), "vision_config = 'yes'"),
    "no hidden_size": (config(text_config__hidden_size=None), "text_config of config.json lacks hidden_size"),
    "hidden_size is a word": (config(text_config__hidden_size="wide"), "hidden_size = 'wide'"),
    "hidden_size is zero": (config(text_config__hidden_size=0), "hidden_size = 0"),
    "no key/value heads": (config(text_config__num_key_value_heads=0), "num_key_value_heads = 0"),
    "heads in no groups": (config(text_config__num_key_value_heads=3), "num_attention_heads of num_key_value_heads"),
    "value heads in no groups": (config(text_config__linear_num_value_heads=5), "linear_num_value_heads of"),
    "interval of zero": (
        config(text_config__layer_types=None, text_config__full_attention_interval=0),
        "full_attention_interval = 0",
    ),
    "too few layer types": (config(text_config__num_hidden_layers=5), "layer_types .* for 5 layers"),
    "unknown layer type": (config(text_config__layer_types=["mamba"] * 4), "layer_types .*mamba"),
    "no rope_theta": (config(text_config__rope_parameters__rope_theta=None), "lacks rope_theta"),
    "another rope": (config(text_config__rope_parameters__rope_type="yarn"), "rope_type 'yarn'"),
    "mrope of another width": (config(text_config__rope_parameters__mrope_section=[1, 1, 1]), "mrope_section"),
    "another activation": (config(text_config__hidden_act="relu"), "hidden_act 'relu'"),
    "another vision activation": (config(vision_config__hidden_act="relu"), "hidden_act 'relu'"),
    "positions in no square": (config(vision_config__num_position_embeddings=35), "num_position_embeddings 35"),
    "gray images": (config(vision_config__in_channels=1), "in_channels 1"),
    "vision heads that do not fit": (config(vision_config__num_heads=3), "4 · num_heads"),
    "no weights": (text(SINGLE, None), r"neither model\.safetensors nor"),
    "missing tensor": (
        tensor(DOWN, lambda _: None),
        r"lacks tensor model\.language_model\.layers\.1\.mlp\.down_proj\.weight",
    ),
    "missing norm": (tensor(TEXT + "norm.weight", lambda _: None), r"lacks tensor model\.language_model\.norm\.weight"),
    "missing embedding": (
        tensor(TEXT + "embed_tokens.weight", lambda _: None),
        r"model\.language_model\.embed_tokens\.weight",
    ),
    "missing vision tensor": (
        tensor(VISION + "patch_embed.proj.weight", lambda _: None),
        r"lacks tensor model\.visual\.patch_embed\.proj\.weight",
    ),
    "misshapen tensor": (tensor(DOWN, lambda values: values.T.copy()), r"down_proj.* \[112, 64\].* \[64, 112\]"),
    "tensor of another rank": (tensor(DOWN, lambda values: values.reshape(-1)), r"has shape \[7168\]"),
    "misshapen embedding": (tensor(TEXT + "embed_tokens.weight", lambda values: values[:-1]), r"\[306, 64\]"),
    "int8 weights": (tensor(DOWN, lambda values: values.astype(np.int8)), "down_proj.weight is I8"),
    "fp8 weights": (tensor(DOWN, lambda values: values.astype("float8_e4m3fn")), "down_proj.weight is F8_E4M3"),
    "double weights": (tensor(DOWN, lambda values: values.astype(np.float64)), "down_proj.weight is F64"),
    "NaN": (tensor(DOWN, with_nan), "down_proj.weight holds values that are not finite"),
    "infinity": (tensor(DOWN, with_infinity), "down_proj.weight holds values that are not finite"),
    "truncated file": (lambda folder: truncate(folder / SINGLE, 0.7), r"model\.safetensors is truncated"),
    "truncated header": (lambda folder: truncate(folder / SINGLE, 0.001), r"model\.safetensors is truncated"),
    "empty file": (text(SINGLE, b""), r"model\.safetensors is truncated"),
    "index is no JSON": (lambda folder: (shard(folder), text(INDEX, b"{")(folder)), r"index\.json is not JSON"),
    "index without a map": (lambda folder: (shard(folder), text(INDEX, b"{}")(folder)), "no weight_map"),
    "missing shard": (
        lambda folder: shard(folder)[1].unlink(),
        r"shard .*model-00002-of-00003\.safetensors is missing",
    ),
    "truncated shard": (lambda folder: truncate(shard(folder)[2], 0.5), r"model-00003.* is truncated"),
    "tensor missing from its shard": (
        lambda folder: (shard(folder), rename_key(folder, DOWN, TEXT + "extra.weight")),
        r"lacks tensor model\.language_model\.extra\.weight, which the index",
    ),
    "no tokenizer": (text("tokenizer.json", None), r"tokenizer\.json: No such file"),
    "tokenizer is no JSON": (text("tokenizer.json", b"<"), r"tokenizer\.json is not JSON"),
    "tokenizer is none": (text("tokenizer.json", b"{}"), r"tokenizer\.json: model has no vocabulary"),
    "template does not parse": (text("chat_template.jinja", b"{% if"), "chat template does not parse"),
    "template is no UTF-8": (text("chat_template.jinja", b"\xff"), r"cannot read .*chat_template\.jinja"),
    "generation_config is no JSON": (text("generation_config.json", b"["), r"generation_config\.json is not JSON"),
    "preprocessor without limits": (text("preprocessor_config.json", b'{"size": {}}'), "lacks shortest_edge"),
    "preprocessor divides by zero": (
        lambda folder: edit_json(folder / "preprocessor_config.json", lambda found: found.update(image_std=[0, 1, 1])),
        "image_std",
    ),
    "embedding smaller than the tokenizer": (
        lambda folder: (
            config(text_config__vocab_size=260)(folder),
            tensor(TEXT + "embed_tokens.weight", lambda values: values[:260])(folder),
        ),
        r"ids up to \d+, the embedding 260 rows",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused_in_one_sentence(name: str, checkpoint: Path) -> None:
    """And leaves nothing behind: no package, no half of one, no temporary folder."""
    change, expected = REFUSED[name]
    change(checkpoint)
    said = refusal(checkpoint)
    assert re.search(expected, said), said


def test_what_float16_cannot_hold_is_refused_where_the_vision_tower_is_kept_in_it(checkpoint: Path) -> None:
    tensor("model.visual.blocks.1.attn.proj.weight", lambda values: np.full_like(values, 1e5))(checkpoint)
    said = refusal(checkpoint, "int4")
    assert "vision.blocks.1.attn.proj holds weights beyond float16's 65504: convert with the recipe fp32" in said
    convert_checkpoint(checkpoint, checkpoint.parent / "package", recipe="fp32")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "absent/config.json" in refusal(tmp_path / "absent")


def test_an_untied_head_that_is_missing_is_refused(tmp_path: Path) -> None:
    """It is not taken for a tied one."""
    checkpoint = copy_checkpoint(tmp_path / "checkpoint", "untied")
    edit_tensors(checkpoint, lambda tensors: tensors.pop("lm_head.weight"))
    assert "lacks tensor lm_head.weight" in refusal(checkpoint)


def test_a_head_of_its_own_is_used(tmp_path: Path) -> None:
    """Doubling it doubles the logits."""
    checkpoint = copy_checkpoint(tmp_path / "checkpoint", "untied")
    plain = logits(checkpoint, tmp_path / "plain")
    edit_tensors(
        checkpoint, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] * BFLOAT16.type(2)})
    )
    np.testing.assert_allclose(logits(checkpoint, tmp_path / "doubled"), 2 * plain, rtol=1e-5)


def test_shards_give_the_same_package_as_one_file(checkpoint: Path, tmp_path: Path) -> None:
    convert_checkpoint(checkpoint, tmp_path / "one")
    shard(checkpoint)
    convert_checkpoint(checkpoint, tmp_path / "many")
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_every_float_type_is_read(checkpoint: Path, tmp_path: Path, dtype: type) -> None:
    """bfloat16 values that others hold exactly give the same logits."""

    def recast(tensors: Tensors) -> None:
        tensors.update({name: values.astype(np.float16).astype(dtype) for name, values in tensors.items()})

    def round_trip(tensors: Tensors) -> None:
        tensors.update({name: values.astype(np.float16).astype(np.float32) for name, values in tensors.items()})

    other = copy_checkpoint(tmp_path / "other")
    edit_tensors(checkpoint, recast)
    edit_tensors(other, round_trip)
    assert np.array_equal(logits(checkpoint, tmp_path / "a"), logits(other, tmp_path / "b"))


def test_a_text_only_checkpoint_gives_the_same_logits(checkpoint: Path, tmp_path: Path) -> None:
    """Qwen3_5ForCausalLM names the same weights otherwise and has no vision tower."""
    expected = logits(checkpoint, tmp_path / "whole")
    text_only(checkpoint)
    assert np.array_equal(expected, logits(checkpoint, tmp_path / "text"))
    assert not Model.open(tmp_path / "text").has_vision


def test_no_vision_leaves_the_tower_out(checkpoint: Path, tmp_path: Path) -> None:
    """Its weights need not even be there, and a broken one does not matter."""
    expected = logits(checkpoint, tmp_path / "whole")
    tensor(VISION + "pos_embed.weight", lambda _: None)(checkpoint)
    assert np.array_equal(expected, logits(checkpoint, tmp_path / "text", vision=False))
    assert "vision.onnx" not in contents(tmp_path / "text")
    with pytest.raises(InvalidInput, match="converted without vision"):
        Model.open(tmp_path / "text").encode_image(np.zeros((32, 32, 3), np.uint8))


def test_multi_token_prediction_is_ignored(checkpoint: Path, tmp_path: Path) -> None:
    """Whatever shape, type and values its weights have."""
    convert_checkpoint(checkpoint, tmp_path / "without")
    broken = {"mtp.layers.0.mlp.up_proj.weight": np.full((3, 3), np.nan, np.float32), "mtp.fc": np.zeros(2, np.int8)}
    edit_tensors(checkpoint, lambda tensors: tensors.update(broken))
    convert_checkpoint(checkpoint, tmp_path / "with")
    assert contents(tmp_path / "without") == contents(tmp_path / "with")


@pytest.mark.parametrize("recipe", ["fp32", "int8", "int4"])
def test_conversion_is_deterministic(checkpoint: Path, tmp_path: Path, recipe: str) -> None:
    for name in ("a", "b"):
        convert_checkpoint(checkpoint, tmp_path / name, recipe=recipe)
    convert_random("tiny", tmp_path / "c", recipe=recipe)
    convert_random("tiny", tmp_path / "d", recipe=recipe)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "c") == contents(tmp_path / "d")


def test_another_seed_is_another_model(tmp_path: Path) -> None:
    made = [convert_random("tiny", tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    assert made[0].files["decoder.onnx.data"] != made[1].files["decoder.onnx.data"]


def test_every_end_of_turn_is_found(checkpoint: Path, tmp_path: Path) -> None:
    """In any of the files that may name one, and in the chat template if none of them does."""
    special = special_tokens(307)
    edit_json(checkpoint / "generation_config.json", lambda found: found.update(eos_token_id=[257, 5]))
    found = convert_checkpoint(checkpoint, tmp_path / "a").spec.eos_token_ids
    assert set(found) == {special["<|im_end|>"], 257, 5}
    (checkpoint / "generation_config.json").unlink()
    config(text_config__eos_token_id=None)(checkpoint)
    assert convert_checkpoint(checkpoint, tmp_path / "b").spec.eos_token_ids == (special["<|im_end|>"],)


@pytest.mark.parametrize("recipe", ["int4", "int8", "fp32"])
def test_large_matrices_are_read_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    """Memory at the peak does not depend on the size of the vocabulary: no slice is larger than the limit."""
    checkpoint = copy_checkpoint(tmp_path / "checkpoint", "untied")
    convert_checkpoint(checkpoint, tmp_path / "whole", recipe=recipe)
    read, sizes = Checkpoint.read, dict[str, list[int]]()

    def measured(self: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> Any:
        values = read(self, name, start, stop)
        sizes.setdefault(name, []).append(values.size)
        return values

    monkeypatch.setattr(Checkpoint, "read", measured)
    monkeypatch.setattr(weights, "SLICE_ELEMENTS", 1000)
    convert_checkpoint(checkpoint, tmp_path / "sliced", recipe=recipe)
    whole, sliced = (contents(tmp_path / name) for name in ("whole", "sliced"))
    # The coarse head is made of a sample of slices.
    assert {name for name in whole if whole[name] != sliced[name]} <= {
        "coarse-head.onnx",
        "coarse-head.onnx.data",
        "manifest.json",
    }
    for name in ("text.embed_tokens.weight", "head.weight", "text.layers.0.mlp.up_proj.weight"):
        assert max(sizes[name]) <= 1000 < sum(sizes[name])


def test_no_file_stays_mapped_between_reads(checkpoint: Path) -> None:
    """Pages of what was read would be resident until the end: the whole checkpoint, then."""
    opened = Checkpoint(checkpoint)
    opened.read("text.embed_tokens.weight")
    assert str(checkpoint) not in Path("/proc/self/maps").read_text()


def test_progress_counts_every_element_once(tmp_path: Path) -> None:
    checkpoint, read = copy_checkpoint(tmp_path / "checkpoint", "untied"), []
    convert_checkpoint(checkpoint, tmp_path / "out", progress=read.append)
    assert sum(read) == Checkpoint(checkpoint).n_elements


def test_an_older_package_is_replaced(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_random("tiny", out)
    convert_checkpoint(checkpoint, out, recipe="fp32")
    assert json.loads((out / "manifest.json").read_text())["recipe"]["name"] == "fp32"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "out"}
    Model.open(out)


def test_an_older_package_survives_a_conversion_that_fails(checkpoint: Path, tmp_path: Path) -> None:
    convert_random("tiny", tmp_path / "out")
    tensor(TEXT + "norm.weight", lambda _: None)(checkpoint)
    refusal(checkpoint)
    Model.open(tmp_path / "out")


def test_an_older_package_comes_back_if_it_cannot_be_replaced(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_random("tiny", tmp_path / "out")
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name.startswith(".out-") and not path.name.endswith(".old"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    assert refusal(checkpoint) == f"cannot write {tmp_path / 'out'}: Input/output error"
    Model.open(tmp_path / "out")


def test_a_link_to_a_package_stays_a_link(checkpoint: Path, tmp_path: Path) -> None:
    convert_random("tiny", tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    convert_checkpoint(checkpoint, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert Model.open(tmp_path / "real").name == "checkpoint int4"


def make_file(out: Path) -> None:
    out.write_text("mine")


def make_folder(out: Path) -> None:
    out.mkdir()
    (out / "mine").touch()


def make_foreign_manifest(out: Path) -> None:
    """Browser extensions and web applications have a file of this name, too."""
    out.mkdir()
    (out / "manifest.json").write_text('{"name": "mine", "files": {"a": 1}}')


def make_package_with_more(out: Path) -> None:
    convert_random("tiny", out)
    (out / "iotd.yaml").touch()


@pytest.mark.parametrize("make", [make_file, make_folder, make_foreign_manifest, make_package_with_more])
def test_what_is_no_package_is_not_overwritten(checkpoint: Path, make: Callable[[Path], None]) -> None:
    make(checkpoint.parent / "out")
    assert "out exists and is no model package: choose another place" in refusal(checkpoint)


def test_the_checkpoint_itself_is_not_overwritten(checkpoint: Path) -> None:
    before = contents(checkpoint)
    with pytest.raises(CheckpointError, match="is no model package"):
        convert_checkpoint(checkpoint, checkpoint)
    assert before == contents(checkpoint)


def test_an_empty_folder_is_taken(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert_checkpoint(checkpoint, tmp_path / "out")
    Model.open(tmp_path / "out")


def test_folders_above_are_made(checkpoint: Path, tmp_path: Path) -> None:
    convert_checkpoint(checkpoint, tmp_path / "a" / "b" / "out")
    Model.open(tmp_path / "a" / "b" / "out")


def test_a_place_below_a_file_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write beside .*file/out"):
        convert_checkpoint(checkpoint, tmp_path / "file" / "out")


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_grow_is_told(checkpoint: Path) -> None:
    with largest_file(300_000):
        assert refusal(checkpoint).endswith("out: File too large")


def test_no_space_left_is_told(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the weights' own file, on a device that is full."""
    monkeypatch.setattr(graph.GraphWriter, "data_path", property(lambda _: Path("/dev/full")))
    assert refusal(checkpoint) == f"no space left for {checkpoint.parent / 'out'}: free some and convert again"


@pytest.mark.parametrize("where", ["hash_file", "write_manifest", "compile_tokenizer"])
def test_no_space_left_for_a_small_file_is_told(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(convert, where, full)
    assert refusal(checkpoint) == f"no space left for {checkpoint.parent / 'out'}: free some and convert again"


def test_an_interrupted_conversion_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(checkpoint, tmp_path / "out", progress=interrupt)
    assert before == set(tmp_path.iterdir())


def test_every_word_of_a_random_package_can_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids between the bytes and the control tokens stand for different made-up words, and texts stay bytes."""
    size = 256 + 1000 + 276
    monkeypatch.setitem(convert.random._SIZES["tiny"][0], "vocab_size", size)
    convert_random("tiny", tmp_path / "out")
    tokenizer = Tokenizer.open(tmp_path / "out" / "tokenizer.bin")
    words = [tokenizer.decode([token]) for token in range(256, min(special_tokens(size).values()))]
    assert len(set(words)) == len(words) == 1000
    assert all(word.startswith(" ") and word.strip().isalpha() for word in words)
    assert len(tokenizer.encode(words[0])) == len(words[0])
