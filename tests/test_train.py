"""How the demo's model is trained, and that what came of it is, token for token, what transformers says it is."""

import math
import os
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="install the oracle extra")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

from transformers import AutoTokenizer, Qwen3_5ForConditionalGeneration  # noqa: E402
from transformers.models.qwen3_5 import modeling_qwen3_5  # noqa: E402

from iotd.convert.convert import convert_checkpoint  # noqa: E402
from iotd.demo import train  # noqa: E402
from iotd.demo.evaluate import ask  # noqa: E402
from iotd.demo.examples import Heard, Seen  # noqa: E402
from iotd.demo.muon import Muon  # noqa: E402
from iotd.demo.network import causal_convolution, gated_delta_rule, grown, picture_inputs, shape  # noqa: E402
from iotd.demo.package import CHECKPOINT  # noqa: E402
from iotd.demo.respondents import PackageRespondent  # noqa: E402
from iotd.engine.entry import Image, Part  # noqa: E402

QUESTIONS = int(os.environ.get("IOTD_ORACLE_QUESTIONS", "60"))


@pytest.mark.parametrize(("key_heads", "heads"), [(2, 2), (2, 6)])
def test_the_quick_delta_rule_is_transformers_own(key_heads: int, heads: int) -> None:
    torch.manual_seed(0)
    query, key = (torch.randn(2, 96, key_heads, 24, requires_grad=True) for _ in range(2))
    value, decay = torch.randn(2, 96, heads, 16), -torch.rand(2, 96, heads)
    inputs = (query, key, value, decay, torch.rand(2, 96, heads))
    found, wanted = (
        rule(*inputs, use_qk_l2norm_in_kernel=True)[0]
        for rule in (gated_delta_rule, modeling_qwen3_5.torch_chunk_gated_delta_rule)
    )
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    slopes = [torch.autograd.grad(out.square().sum(), (query, key)) for out in (found, wanted)]
    torch.testing.assert_close(*slopes, atol=1e-4, rtol=1e-3)


def test_the_quick_convolution_is_transformers_own() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 12, 40, requires_grad=True), torch.randn(12, 4)
    found, wanted = (rule(x, weight, None, "silu") for rule in (causal_convolution, modeling_qwen3_5.causal_conv1d_fn))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    slopes = [torch.autograd.grad(out.square().sum(), x) for out in (found, wanted)]
    torch.testing.assert_close(*slopes, atol=1e-5, rtol=1e-4)


def test_a_network_that_has_grown_computes_what_it_did() -> None:
    torch.manual_seed(0)
    small_shape = shape()
    small_shape.text_config.num_hidden_layers = 4
    small_shape.text_config.layer_types = small_shape.text_config.layer_types[:4]
    small, large = (Qwen3_5ForConditionalGeneration(of).eval() for of in (small_shape, shape()))
    large.load_state_dict(grown(small.state_dict(), large))
    ids = torch.randint(0, shape().text_config.vocab_size, (1, 64))
    with torch.no_grad():
        torch.testing.assert_close(large(ids).logits, small(ids).logits)


def test_muon_makes_a_step_of_the_same_length_in_every_direction() -> None:
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.zeros(48, 32))
    optimizer = Muon([matrix], lr=1.0, weight_decay=0.0)
    matrix.grad = torch.randn(48, 32) * torch.logspace(0, -2, 32)
    optimizer.step()
    lengths = torch.linalg.svdvals(matrix.detach()) / math.sqrt(48 / 32)
    assert 0.5 < lengths.min() < lengths.max() < 1.5


def test_a_run_that_was_cut_off_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    stages = tuple(
        replace(stage, steps=4, rows=2, length=128 if stage.length else 0)
        for stage in train.STAGES
        if stage.name in ("vision", "pictures")
    )
    for name in ("whole", "first"):
        (tmp_path / name).mkdir()
        train.train_tokenizer(train._corpus(), tmp_path / name / "tokenizer.json")
        train.compile_tokenizer(tmp_path / name / "tokenizer.json", tmp_path / name / "tokenizer.bin")
    whole, first = (train.Trainer(tmp_path / name, stages) for name in ("whole", "first"))
    with train.quick():
        for stage in stages:
            whole.run(stage)
            first.run(replace(stage, steps=2) if stage is stages[0] else stage)
            first.save()
            first = train.Trainer(tmp_path / "first", stages)
            first.load()
            first.run(stage)
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, first.network.state_dict()[name]), name


class Recorder(PackageRespondent):
    """Keeps the prompts that it answers, as transformers wants them."""

    def begin(self) -> None:
        self.stream: list[Part] = []
        self.pictures: list[np.ndarray] = []
        super().begin()

    def read(self, event: Heard | Seen) -> None:
        if isinstance(event, Seen):
            self.pictures.append(event.scene.rgb)
        super().read(event)

    def answer(self, question: str, seed: int | None = None) -> str:
        before = [*self.stream]
        text = super().answer(question, seed)
        self.prompt, self.stream = self.stream, before
        return text

    def _feed(self, state: Any, parts: list[Part], **options: Any) -> Any:
        self.stream += parts
        return super()._feed(state, parts, **options)


@dataclass
class Networks:
    reference: Any
    package: Recorder


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Networks:
    folder = tmp_path_factory.mktemp("demo") / "package"
    convert_checkpoint(CHECKPOINT, folder, recipe="fp32")
    reference = Qwen3_5ForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    return Networks(reference.eval(), Recorder(folder, threads=2))


def test_the_checkpoint_is_of_the_shape_that_is_trained_and_small(networks: Networks) -> None:
    assert networks.reference.config.text_config.layer_types == shape().text_config.layer_types
    assert networks.reference.config.text_config.vocab_size == shape().text_config.vocab_size
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 6_000_000
    with (CHECKPOINT / "model.safetensors").open("rb") as file:
        assert b'"BF16"' in file.read(400)


def test_its_tokenizer_and_template_are_read_alike_by_transformers(networks: Networks) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    messages = [{"role": "system", "content": "You watch."}, {"role": "user", "content": "Is it 21.4 °C?\n<3"}]
    wanted = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    model = networks.package._model
    found = model.chat.tokenize(model.chat.render(messages), model.tokenizer)
    assert [token for run in found for token in run] == list(wanted)


def test_greedy_answers_agree_with_transformers_token_for_token(networks: Networks) -> None:
    """Every token of the package's answer, its end included, is transformers' first choice after what is before it.

    IOTD_ORACLE_QUESTIONS sets how many are asked.
    """
    agreed = asked = 0
    for outcome in islice(ask(networks.package, QUESTIONS), QUESTIONS):
        asked += 1
        agreed += _agrees(networks, outcome.answer)
    assert agreed / asked >= 0.995, f"{agreed} of {asked} answers agree"


def _agrees(networks: Networks, answer: str) -> bool:
    package = networks.package
    model = package._model
    pad = networks.reference.config.image_token_id
    end = model.tokenizer.encode(model.chat.assistant.after, special=True)[:1]
    said = [*model.tokenizer.encode(answer, special=False), *end]
    ids: list[int] = []
    for part in package.prompt:
        ids += [pad] * part.n_tokens if isinstance(part, Image) else part
    inputs = torch.tensor([[*ids, *said]])
    seen: dict[str, Any] = {}
    if package.pictures:
        seen = {**picture_inputs(package.pictures), "mm_token_type_ids": (inputs == pad).int()}
    with torch.no_grad():
        logits = networks.reference(input_ids=inputs, use_cache=False, **seen).logits[0]
    return logits[len(ids) - 1 : -1].argmax(-1).tolist() == said
