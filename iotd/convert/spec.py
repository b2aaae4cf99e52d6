"""config.json of a checkpoint to the ModelSpec of a package. Every dimension comes from here; none is assumed."""

from math import isqrt
from pathlib import Path
from typing import Annotated, Any

import msgspec

from iotd.convert.checkpoint import read_json
from iotd.errors import CheckpointError
from iotd.model.spec import LayerKind, ModelSpec, VisionSpec

Count = Annotated[int, msgspec.Meta(ge=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
KINDS: dict[str, LayerKind] = {"linear_attention": "linear", "full_attention": "full"}
# Defaults of Qwen3.5's image processor (preprocessor_config.json of the published checkpoints).
PREPROCESSOR: dict[str, Any] = {
    "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


class _Fields:
    """A section of config.json whose missing or misshapen keys become errors that name them."""

    def __init__(self, section: dict[str, Any], where: str) -> None:
        self.section = section
        self.where = where

    def get(self, key: str, kind: Any, default: Any = msgspec.NODEFAULT) -> Any:
        value = self.section.get(key)
        if value is None:
            if default is msgspec.NODEFAULT:
                raise CheckpointError(f"{self.where} lacks {key}")
            return default
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            raise CheckpointError(f"{self.where} has {key} = {value!r}: {error}") from error


def spec_from_config(config: dict[str, Any], folder: Path | None, *, tied: bool, vision: bool) -> ModelSpec:
    """The dimensions of a `qwen3_5` or `qwen3_5_text` checkpoint.

    `folder` is where generation_config.json and preprocessor_config.json are looked for. `tied` says whether the head
    shares the embedding. Raises CheckpointError for an unknown architecture or a value that iotd does not support.
    """
    kind = config.get("model_type")
    if kind not in ("qwen3_5", "qwen3_5_text"):
        raise CheckpointError(
            f"config.json says model_type {kind!r} (architectures {config.get('architectures')}): iotd converts "
            "qwen3_5 and qwen3_5_text, the dense Qwen3.5 models"
        )
    if method := config.get("quantization_config"):
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise CheckpointError(f"the checkpoint is already quantised ({method}): convert from the unquantised one")
    if kind == "qwen3_5":
        section = _Fields(config, "config.json").get("text_config", dict[str, Any])
        text = _Fields(section, "text_config of config.json")
    else:
        text = _Fields(config, "config.json")
    if (activation := text.get("hidden_act", str, "silu")) != "silu":
        raise CheckpointError(f"{text.where} has hidden_act {activation!r}: only silu is known for Qwen3.5")
    if text.get("attention_bias", bool, False):
        raise CheckpointError(f"{text.where} has attention_bias: no Qwen3.5 has one and iotd does not support it")
    rope = _rope(text)
    head_dim = text.get("head_dim", Count)
    spec = ModelSpec(
        vocab_size=text.get("vocab_size", Count),
        hidden_size=text.get("hidden_size", Count),
        intermediate_size=text.get("intermediate_size", Count),
        layers=_layers(text),
        num_heads=text.get("num_attention_heads", Count),
        num_kv_heads=text.get("num_key_value_heads", Count),
        head_dim=head_dim,
        rotary_dim=int(head_dim * rope.get("partial_rotary_factor", Positive, 0.25)),
        rope_theta=rope.get("rope_theta", Positive),
        mrope_section=rope.get("mrope_section", tuple[int, int, int], (11, 11, 10)),
        max_positions=text.get("max_position_embeddings", Count, 32768),
        linear_key_heads=text.get("linear_num_key_heads", Count),
        linear_value_heads=text.get("linear_num_value_heads", Count),
        linear_key_dim=text.get("linear_key_head_dim", Count),
        linear_value_dim=text.get("linear_value_head_dim", Count),
        conv_kernel=text.get("linear_conv_kernel_dim", Count),
        rms_eps=text.get("rms_norm_eps", Positive, 1e-6),
        tied=tied,
        eos_token_ids=_eos(config, text, folder),
        vision=_vision(config, folder) if vision else None,
    )
    _check(spec)
    return spec


def _layers(text: _Fields) -> tuple[LayerKind, ...]:
    count = text.get("num_hidden_layers", Count)
    interval = text.get("full_attention_interval", Count, 4)
    default = ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(count)]
    types = text.get("layer_types", list[str], default)
    if len(types) != count or not set(types) <= set(KINDS):
        raise CheckpointError(f"{text.where} has layer_types {types} for {count} layers; known are {sorted(KINDS)}")
    return tuple(KINDS[kind] for kind in types)


def _rope(text: _Fields) -> _Fields:
    rope = _Fields(text.get("rope_parameters", dict[str, Any], text.section), "rope_parameters of text_config")
    if (kind := rope.get("rope_type", str, "default")) != "default":
        raise CheckpointError(f"rope_parameters has rope_type {kind!r}: iotd knows the default one only")
    return rope


def _eos(config: dict[str, Any], text: _Fields, folder: Path | None) -> tuple[int, ...]:
    """Every end-of-turn id that the checkpoint names, in any of the places where it may."""
    found: list[Any] = [config.get("eos_token_id"), text.section.get("eos_token_id")]
    if folder is not None and (folder / "generation_config.json").exists():
        found.append(read_json(folder / "generation_config.json").get("eos_token_id"))
    ids: list[int] = []
    for value in found:
        for token_id in value if isinstance(value, list) else [value]:
            if isinstance(token_id, int) and token_id not in ids:
                ids.append(token_id)
    return tuple(ids)


def _vision(config: dict[str, Any], folder: Path | None) -> VisionSpec:
    section = _Fields(config, "config.json").get("vision_config", dict[str, Any])
    vision = _Fields(section, "vision_config of config.json")
    images = _Fields(_preprocessor(folder), "preprocessor_config.json")
    size = _Fields(images.get("size", dict[str, Any], PREPROCESSOR["size"]), "size of preprocessor_config.json")
    positions = vision.get("num_position_embeddings", Count)
    if isqrt(positions) ** 2 != positions:
        raise CheckpointError(f"vision_config has num_position_embeddings {positions}: only a square table is known")
    rope = _Fields(vision.get("rope_parameters", dict[str, Any], {}), "rope_parameters of vision_config")
    return VisionSpec(
        depth=vision.get("depth", Count),
        hidden_size=vision.get("hidden_size", Count),
        intermediate_size=vision.get("intermediate_size", Count),
        num_heads=vision.get("num_heads", Count),
        patch_size=vision.get("patch_size", Count),
        temporal_patch_size=vision.get("temporal_patch_size", Count),
        merge_size=vision.get("spatial_merge_size", Count),
        in_channels=vision.get("in_channels", Count, 3),
        grid_side=isqrt(positions),
        rope_theta=rope.get("rope_theta", Positive, 10000.0),
        activation=vision.get("hidden_act", str),
        min_pixels=size.get("shortest_edge", Count),
        max_pixels=size.get("longest_edge", Count),
        mean=images.get("image_mean", tuple[float, float, float], (0.5, 0.5, 0.5)),
        std=images.get("image_std", tuple[Positive, Positive, Positive], (0.5, 0.5, 0.5)),
    )


def _preprocessor(folder: Path | None) -> dict[str, Any]:
    """The image processor's settings, from either of the files that transformers writes them to."""
    if folder is not None:
        if (folder / "preprocessor_config.json").exists():
            return read_json(folder / "preprocessor_config.json")
        if (folder / "processor_config.json").exists():
            processor = _Fields(read_json(folder / "processor_config.json"), "processor_config.json")
            section: dict[str, Any] = processor.get("image_processor", dict[str, Any], PREPROCESSOR)
            return section
    return PREPROCESSOR


def _check(spec: ModelSpec) -> None:
    _check_multiple(spec.num_heads, spec.num_kv_heads, "num_attention_heads of num_key_value_heads")
    _check_multiple(spec.linear_value_heads, spec.linear_key_heads, "linear_num_value_heads of linear_num_key_heads")
    if spec.vision is not None:
        _check_vision(spec.vision)
    if sum(spec.mrope_section) * 2 != spec.rotary_dim:
        raise CheckpointError(
            f"config.json: mrope_section {spec.mrope_section} must add up to half of {spec.rotary_dim} rotary dims"
        )


def _check_vision(spec: VisionSpec) -> None:
    _check_multiple(spec.hidden_size, 4 * spec.num_heads, "vision_config's hidden_size of 4 · num_heads")
    if spec.in_channels != 3:
        raise CheckpointError(f"vision_config has in_channels {spec.in_channels}: iotd knows 3 only, those of RGB")


def _check_multiple(multiple: int, of: int, what: str) -> None:
    if multiple % of:
        raise CheckpointError(f"config.json: {what} must be a multiple, found {multiple} of {of}")
