"""The demo's network: its shape, its tokenizer, how it begins, and the checkpoint it is written as.

transformers' own Qwen3.5; what is changed is how fast it computes whole sequences, not what.
"""

import contextlib
import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration
from transformers.models.qwen3_5 import modeling_qwen3_5

from iotd.convert.spec import spec_from_config
from iotd.demo.scene import SIZE
from iotd.events import RGB
from iotd.model.pretokenizer import QWEN3_5
from iotd.model.spec import VisionSpec
from iotd.model.vision import patches

VOCAB_SIZE = 768
HIDDEN = 128
N_LAYERS = 8
ATTENTION_EVERY = 4
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<think>",
    "</think>",
)
PATCH, MERGE = 16, 2
SIDE = SIZE // (PATCH * MERGE)
"""Tokens along one side of a picture."""
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "size": {"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": 2,
}


TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
}
CHAT_TEMPLATE = """\
{%- macro written(content) %}
    {%- if content is string %}{{- content }}
    {%- else %}
        {%- for part in content %}
            {{- '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- set last = namespace(user=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.index0 > last.user %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
    {{- written(message.content) | trim }}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
"""Writes conversations as Qwen3.5 does; knows no tools."""


def shape() -> Qwen3_5Config:
    """The demo model's shape: the family's, at its smallest."""
    first = VOCAB_SIZE - len(SPECIAL)
    ids = {token: first + i for i, token in enumerate(SPECIAL)}
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": 3 * HIDDEN,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 32,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
        "eos_token_id": ids["<|im_end|>"],
    }
    vision = {
        "depth": 3,
        "hidden_size": 96,
        "num_heads": 3,
        "intermediate_size": 256,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 100,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
    }
    config = Qwen3_5Config(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    return config


@functools.cache
def vision_spec() -> VisionSpec:
    """How the daemon cuts a picture into patches for this network."""
    document = json.loads(shape().to_json_string(use_diff=False))
    spec = spec_from_config(document, None, tied=True, vision=True).vision
    assert spec is not None
    return spec


def picture_inputs(pictures: Sequence[RGB]) -> dict[str, Tensor]:
    """uint8 pictures [SIZE, SIZE, 3] as transformers takes them: `pixel_values` [n, P] and `image_grid_thw` [n, 3]."""
    spec = vision_spec()
    flat = np.concatenate([patches(picture, spec) for picture in pictures])
    twice = flat.reshape(len(flat), 3, 1, -1).repeat(2, axis=2)  # a still picture is two equal moments
    return {
        "pixel_values": torch.from_numpy(twice.reshape(len(flat), -1)),
        "image_grid_thw": torch.tensor([[1, SIZE // PATCH, SIZE // PATCH]] * len(pictures)),
    }


def train_tokenizer(corpus: Iterable[str], out: Path) -> None:
    """Byte-level BPE with the family's pre-tokenizer: writes a tokenizer.json of VOCAB_SIZE tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN3_5), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([*SPECIAL])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    tokenizer.save(str(out))


@torch.no_grad()
def lengthen_memory(network: nn.Module) -> None:
    """Begin with heads that forget over 10 to 1,000 tokens (Gu and Dao, Mamba, arXiv:2312.00752, section 3.6).

    transformers leaves a step size of one, with which most heads forget all within a token and recall is never learnt.
    """
    for name, parameter in network.named_parameters():
        if name.endswith("A_log"):
            parameter.copy_(torch.empty_like(parameter).uniform_(1, 16).log())
        elif name.endswith("dt_bias"):
            step = torch.empty_like(parameter).uniform_(math.log(1e-4), math.log(1e-2)).exp()
            parameter.copy_(step + (-(-step).expm1()).log())


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 32,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = True,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers' `torch_chunk_gated_delta_rule` computes, with a triangular solve in place of its loop.

    Yang et al., Gated Delta Networks (arXiv:2412.06464), section 3.3: within a chunk the updates are the solution of a
    unit lower triangular system. query, key: [B, T, K, k]; value [B, T, V, v]; g, beta [B, T, V]. T is a multiple of
    chunk_size; whole sequences only.
    """
    assert initial_state is None
    assert not output_final_state
    assert use_qk_l2norm_in_kernel
    with torch.autocast("cpu", enabled=False):
        out = _delta_rule(query.float(), key.float(), value.float(), g.float(), beta.float(), chunk_size)
    return out.to(query.dtype), None


def _delta_rule(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, chunk_size: int) -> Tensor:
    """In float32, whatever the rest is computed in: the system is solved by substitution, which adds errors up."""
    batch, length, key_heads, key_dim = key.shape
    heads, value_dim = value.shape[-2:]
    chunks = length // chunk_size
    query, key = F.normalize(query, dim=-1, eps=1e-6) * key_dim**-0.5, F.normalize(key, dim=-1, eps=1e-6)
    if heads != key_heads:
        query, key = (x.repeat_interleave(heads // key_heads, dim=2) for x in (query, key))
    q, k, v, b = (
        x.transpose(1, 2).reshape(batch * heads, chunks, chunk_size, -1) for x in (query, key, value, beta[..., None])
    )
    decay = g.transpose(1, 2).reshape(batch * heads, chunks, chunk_size).cumsum(-1)
    later = torch.ones(chunk_size, chunk_size, dtype=torch.bool).triu(1)
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(later, -math.inf).exp()
    system = torch.eye(chunk_size) + (k * b @ k.mT * between).tril(-1)
    since_start = decay.exp()[..., None]
    sides = torch.cat([v * b, k * b * since_start], -1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    new, seen = solved.split([value_dim, key_dim], -1)
    within = q @ k.mT * between
    q = q * since_start
    to_end = k * (decay[..., -1:] - decay).exp()[..., None]
    kept = decay[..., -1].exp()
    state = torch.zeros(batch * heads, key_dim, value_dim)
    out = []
    for i in range(chunks):
        update = new[:, i] - seen[:, i] @ state
        out.append(q[:, i] @ state + within[:, i] @ update)
        state = state * kept[:, i, None, None] + to_end[:, i].mT @ update
    whole = torch.stack(out, 1).reshape(batch, heads, length, value_dim)
    return whole.transpose(1, 2)


def causal_convolution(x: Tensor, weight: Tensor, bias: None = None, activation: str = "silu", **_: Any) -> Tensor:
    """What transformers' `causal_conv1d_fn` computes, as sums of shifted rows, which compile into one loop.

    x: [B, C, T], in memory as [B, T, C]; weight [C, k].
    """
    assert bias is None
    assert activation == "silu"
    width, length = weight.shape[1], x.shape[2]
    padded = F.pad(x.transpose(1, 2), (0, 0, width - 1, 0))
    mixed = sum(padded[:, i : i + length] * weight[:, i] for i in range(width))
    assert isinstance(mixed, Tensor)
    return F.silu(mixed).transpose(1, 2)


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """transformers' own model with the faster forms of its delta rule and convolution, for whole sequences."""
    faster = {"torch_chunk_gated_delta_rule": gated_delta_rule, "causal_conv1d_fn": causal_convolution}
    reference = {name: getattr(modeling_qwen3_5, name) for name in faster}
    try:
        for name, function in faster.items():
            setattr(modeling_qwen3_5, name, function)
        yield
    finally:
        for name, function in reference.items():
            setattr(modeling_qwen3_5, name, function)


@functools.cache
def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself; elsewhere it is emulated, and slower than float32."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(Path("/proc/cpuinfo").read_text().split())


def grown(known: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The weights of a network of half the depth, spread over this one so that it computes the same.

    The layers between its first three and its last are new, and add nothing yet: their last projections are nought.
    """
    weights: dict[str, Tensor] = {}
    for name, fresh in network.state_dict().items():
        found = re.fullmatch(r"(.*language_model\.layers\.)(\d+)(\..*)", name)
        if found is None or (layer := int(found[2])) < ATTENTION_EVERY - 1:
            weights[name] = known[name]
        elif layer == N_LAYERS - 1:
            weights[name] = known[f"{found[1]}{ATTENTION_EVERY - 1}{found[3]}"]
        else:
            last = name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight"))
            weights[name] = torch.zeros_like(fresh) if last else fresh
    return weights


def export(network: Qwen3_5ForConditionalGeneration, tokenizer: Path, out: Path) -> None:
    """The checkpoint as transformers writes it, in bfloat16, with tokenizer, chat template and preprocessor."""
    network.bfloat16().save_pretrained(out)
    (out / "tokenizer.json").write_text(tokenizer.read_text())
    (out / "tokenizer_config.json").write_text(json.dumps(TOKENIZER, indent=1) + "\n")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (out / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=1) + "\n")
