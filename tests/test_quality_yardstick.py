"""The yardstick on real weights: its grids, texts and stacks; and, heavy, what it says of conversion's default."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from yardstick.grids import Q4_K, Q6_K, Grid, mixture, on_grid
from yardstick.heads import State, StoredHead
from yardstick.stacks import open_stack
from yardstick.texts import LENGTH, Text, cut, default_texts, read_texts

from iotd.convert.layers import FLOAT, Layers
from iotd.convert.weights import Matrix

Floats = NDArray[np.float32]
SCRIPT = Path(__file__).parent / "quality_yardstick.py"
NOT_YET = pytest.mark.xfail(reason="its chat is 0.94 to 1.01 times as far, from run to run", strict=False)


def weights(rows: int, columns: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def error(weight: Floats, grid: Grid) -> float:
    """Relative to the matrix."""
    return float(np.linalg.norm(on_grid(weight, grid) - weight) / np.linalg.norm(weight))


@pytest.mark.parametrize("columns", [128, 256])
def test_what_lies_on_a_grid_stays(columns: int) -> None:
    """Matrices that the formats can hold exactly, in super-blocks of 128 and 256, are found again."""
    rng = np.random.default_rng(0)

    def multiples(least: int, most: int, size: int) -> Floats:
        """Of a sub-block's scale, the largest one in each row: [8, sub-blocks, 1]."""
        found = rng.integers(least, most, (8, columns // size, 1)).astype(np.float32)
        found[:, 0] = most
        return found

    levels = rng.integers(0, 16, (8, columns // 32, 32)).astype(np.float32)
    levels[..., :2] = 0, 15
    coarse = (levels * multiples(20, 63, 32) / 256 - multiples(20, 63, 32) / 128).reshape(8, columns)
    levels = rng.integers(-31, 32, (8, columns // 16, 16)).astype(np.float32)
    levels[..., 0] = -32
    fine = (levels * -multiples(60, 128, 16) / 1024).reshape(8, columns)
    assert np.abs(on_grid(coarse, Q4_K) - coarse).max() < 1e-5
    assert np.abs(on_grid(fine, Q6_K) - fine).max() < 1e-5


def test_grids_err_as_their_bits_say() -> None:
    """On normal weights Q4_K errs by 6 to 8 %, Q6_K by 1.5 to 2 %: two bits are a factor of four."""
    weight = weights(64, 768)
    assert 0.06 < error(weight, Q4_K) < 0.08
    assert 0.015 < error(weight, Q6_K) < 0.02


@pytest.mark.parametrize("grid", [Q4_K, Q6_K], ids=lambda grid: grid.name)
@pytest.mark.parametrize("weight", [np.zeros((2, 256), np.float32), np.full((2, 256), 3, np.float32)])
def test_grids_hold_a_constant(grid: Grid, weight: Floats) -> None:
    """A matrix of one value is nearly kept, zeros exactly."""
    assert np.abs(on_grid(weight, grid) - weight).max() <= 0.01 * np.abs(weight).max()


def test_the_mixture_has_the_finer_grid_for_the_table_and_half_of_v_and_down() -> None:
    """Of 30 layers 14 have v and down in Q6_K, and no other matrix but the table has."""
    names = [f"text.layers.{i}.{part}" for i in range(30) for part in ("mlp.down_proj", "mlp.up_proj")]
    finer = [name for name in names if mixture(name, 30) is Q6_K]
    assert all(name.endswith("down_proj") for name in finer)
    assert [int(name.split(".")[2]) for name in finer] == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]
    assert mixture("head", 30) is Q6_K
    assert mixture("text.layers.0.self_attn.v_proj", 30) is Q6_K


def test_a_line_begins_a_kind_of_text(tmp_path: Path) -> None:
    """`## KIND` begins a kind; deeper headings are text."""
    path = tmp_path / "texts.md"
    path.write_text("## prose\nOne.\n### Two\n\n## sensor lines\n[10:00:00] door open\n")
    assert read_texts(path) == [Text("prose", "One.\n### Two"), Text("sensor lines", "[10:00:00] door open")]


@pytest.mark.parametrize("text", ["", "No kind.\n", "## prose\n\n## sensor\nText.\n"])
def test_a_text_without_a_kind_or_a_kind_without_text_is_refused(tmp_path: Path, text: str) -> None:
    """The error names the file and what it lacks."""
    path = tmp_path / "texts.md"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"texts\.md.*## KIND"):
        read_texts(path)


def test_default_texts_are_three_kinds_and_always_the_same() -> None:
    """Prose, sensor and chat, enough of the endless ones for 20,000 tokens in all."""
    texts = default_texts()
    assert [text.kind for text in texts] == ["prose", "sensor", "chat"]
    assert texts == default_texts()
    assert min(len(text.text) for text in texts[:2]) >= 100_000


def test_sequences_begin_as_the_model_wants_and_leave_out_no_more_than_a_short_rest() -> None:
    """Each has at most LENGTH tokens; a rest of a few tokens is dropped, but a short text is kept."""
    ids = [*range(10, 10 + 2 * (LENGTH - 1) + 5)]
    sequences = cut(ids, (1,))
    assert [len(each) for each in sequences] == [LENGTH, LENGTH]
    assert [int(each[0]) for each in sequences] == [1, 1]
    assert np.concatenate([each[1:] for each in sequences]).tolist() == ids[:-5]
    assert [each.tolist() for each in cut([4, 5, 6], ())] == [[4, 5, 6]]


@dataclass
class RandomTensors:
    """Of one layout, made when they are asked for."""

    fields: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    made: dict[str, Floats] = field(default_factory=dict)

    def field(self, name: str) -> Any:
        return self.fields.get(name)

    def vector(self, name: str) -> Floats:
        return self._make(name) + 1

    def matrix(self, name: str) -> Matrix:
        return Matrix.of(self._make(name))

    def _make(self, name: str) -> Floats:
        if name not in self.made:
            rng = np.random.default_rng(len(self.made))
            shape = self.shapes[name.split(".", 2)[2] if name.startswith("blk.") else name]
            self.made[name] = (rng.standard_normal(shape) * (0.2 if len(shape) > 1 else 0.1)).astype(np.float32)
        return self.made[name]


HEADS, KV_HEADS, SIZE, WIDTH, INNER, VOCAB, WINDOW = 4, 2, 16, 24, 40, 50, 9
SHAPES: dict[str, tuple[int, ...]] = {
    "token_embd.weight": (VOCAB, WIDTH),
    "attn_q.weight": (HEADS * SIZE, WIDTH),
    "attn_k.weight": (KV_HEADS * SIZE, WIDTH),
    "attn_v.weight": (KV_HEADS * SIZE, WIDTH),
    "attn_output.weight": (WIDTH, HEADS * SIZE),
    "ffn_gate.weight": (INNER, WIDTH),
    "ffn_up.weight": (INNER, WIDTH),
    "ffn_down.weight": (WIDTH, INNER),
    "attn_q_norm.weight": (SIZE,),
    "attn_k_norm.weight": (SIZE,),
    **dict.fromkeys(("output_norm.weight",), (WIDTH,)),
    **{f"{part}_norm.weight": (WIDTH,) for part in ("attn", "ffn", "post_attention")},
    "post_ffw_norm.weight": (WIDTH,),
}


def random_tensors(kind: str) -> RandomTensors:
    fields = {
        "block_count": 3 if kind == "llama" else 7,
        "embedding_length": WIDTH,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": SIZE,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 50_000.0,
    }
    if kind == "gemma3":
        fields["attention.sliding_window"] = WINDOW
    named = {f"{kind}.{name}": value for name, value in fields.items()}
    return RandomTensors({"general.architecture": kind, **named}, SHAPES)


NAMES = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "attn_norm.weight": "input_layernorm.weight",
}
NORMS = {
    "llama": {"ffn_norm.weight": "post_attention_layernorm.weight"},
    "gemma3": {
        "post_attention_norm.weight": "post_attention_layernorm.weight",
        "ffn_norm.weight": "pre_feedforward_layernorm.weight",
        "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    },
}


def reference(kind: str) -> Any:
    """transformers' model of that shape."""
    transformers = pytest.importorskip("transformers", reason="install the oracle extra")
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": SIZE,
        "rms_norm_eps": 1e-6,
    }
    if kind == "llama":
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 50_000.0}
        config = transformers.LlamaConfig(**sizes, num_hidden_layers=3, rope_parameters=rope)
        return transformers.LlamaModel(config).eval()
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 50_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    more = {"num_hidden_layers": 7, "sliding_window": WINDOW, "query_pre_attn_scalar": SIZE, "rope_parameters": rope}
    kinds = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    return transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**sizes, **more, layer_types=kinds)).eval()


def stored_name(kind: str, name: str) -> str:
    """What transformers calls a tensor of a GGUF file."""
    if not name.startswith("blk."):
        return {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}[name]
    _, i, part = name.split(".", 2)
    return f"layers.{i}.{ {**NAMES, **NORMS[kind]}[part] }"


def stored(kind: str, name: str, tensors: RandomTensors) -> Floats:
    """What transformers has for it: Gemma's norms less one, Llama's rotary halves apart."""
    values = tensors.made[name]
    if values.ndim == 1:
        return values if kind == "gemma3" else values + 1
    if kind == "llama" and ("attn_q" in name or "attn_k" in name):
        return np.ascontiguousarray(values.reshape(-1, SIZE // 2, 2, WIDTH).swapaxes(1, 2)).reshape(values.shape)
    return values


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.filterwarnings("ignore")
def test_stacks_agree_with_transformers(kind: str, tmp_path: Path) -> None:
    """Hidden states of a sequence that is longer than the window are those of transformers' own model."""
    torch = pytest.importorskip("torch", reason="install the oracle extra")
    network, tensors = reference(kind), random_tensors(kind)
    stack = open_stack(tensors)
    ids = np.random.default_rng(1).integers(0, VOCAB, 40)
    hidden = Layers(stack, [ids], tmp_path).hidden(FLOAT)
    state = {stored_name(kind, name): torch.from_numpy(stored(kind, name, tensors)) for name in tensors.made}
    network.load_state_dict(state, strict=False)
    assert set(state) == {name for name, _ in network.named_parameters()}
    with torch.no_grad():
        expected = network(torch.from_numpy(ids)[None]).last_hidden_state[0].numpy()
    assert np.abs(hidden - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_head_without_calibration_falls_back_always(tmp_path: Path) -> None:
    """It gives the logits of the table as it is stored, and every state counts as one that falls back."""
    table, hidden = weights(300, 32), weights(20, 32, seed=1)
    head = StoredHead(Matrix.of(table), FLOAT, None, tmp_path)
    assert np.abs(head.logits(hidden) - hidden @ table.T).max() < 1e-4
    assert head.figures(hidden) == {"argmax": 1.0, "top20": 1.0, "kl": 0.0, "fallback": 1.0}


def test_a_state_tells_what_a_head_left_out() -> None:
    """Tokens without a logit lower what is drawn by their odds, and the likeliest one's loss is seen."""
    exact = np.linspace(0, 10, 100, dtype=np.float32)
    found = np.where(exact < 5, np.float32(-np.inf), exact)
    assert State.of(exact, exact) == State(fallback=True, same=True, top=1.0, kl=0.0)
    assert State.of(exact, found) == State(fallback=False, same=True, top=1.0, kl=0.0)
    found[-1] = -np.inf
    lost = State.of(exact, found)
    odds = 1 / sum(np.exp(-n * 10 / 99 / 0.7) for n in range(20))
    assert not lost.same
    assert lost.top == 0.95
    assert lost.kl == pytest.approx(odds * np.log(odds / 1e-6) + (1 - odds) * np.log(1 - odds), rel=0.05)


def test_steps_are_those_of_the_grid(tmp_path: Path) -> None:
    """Of random blocks of each type the values lie on whole steps from each other."""
    gguf = pytest.importorskip("gguf", reason="install the yardstick extra")
    from yardstick.sources import steps

    rng = np.random.default_rng(0)
    for kind in (gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K")):
        _, nbytes = gguf.GGML_QUANT_SIZES[kind]
        packed = rng.integers(0, 256, (40, nbytes), np.uint8)
        for at in {"Q4_K": (0, 2), "Q4_1": (0, 2), "Q6_K": (208,)}.get(kind.name, (0,)):
            packed[:, at : at + 2] = rng.uniform(0.01, 0.1, (40, 1)).astype(np.float16).view(np.uint8)
        values = gguf.dequantize(packed, kind).reshape(-1, 16)
        found = steps(packed, kind).reshape(-1, 16)
        assert (found.min(axis=1) == found.max(axis=1)).all()
        apart = (values - values[:, :1]) / np.where(found == 0, 1, found)
        assert np.abs(apart - np.rint(apart)).max() < 1e-2, kind


@pytest.mark.heavy
@pytest.mark.parametrize("model", ["smollm2-135m", pytest.param("gemma3-270m", marks=NOT_YET)])
def test_the_default_recipe_is_no_further_from_float32_than_q4_k_m_at_no_more_bits(model: str) -> None:
    """On each kind of text, with everything quantised and int8 activations; minutes."""
    pytest.importorskip("gguf", reason="install the yardstick extra")
    command = [sys.executable, str(SCRIPT), model, "--recipe", "default", "--recipe", "q4_k_m", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "pip install" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    default, other = (json.loads(line) for line in done.stdout.splitlines())
    assert default["bits"] <= other["bits"]
    for ours, theirs in zip(default["texts"], other["texts"], strict=True):
        assert ours["kld_mean"] <= theirs["kld_mean"], ours["kind"]
