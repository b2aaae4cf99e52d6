"""How far a package's answers are from those of the checkpoint it was made of, token by token.

The package is measured as the daemon runs it. The reference is a float32 package, or the checkpoint itself, which runs
layer by layer; that tells, too, which matrices cost most.
"""

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from iotd.convert.convert import open_stack
from iotd.convert.layers import FLOAT, Layers
from iotd.convert.packaged import Packaged
from iotd.convert.quality import ROWS, Divergence, by_kind, divergence, float_logits, scored
from iotd.convert.samples import Sequence as Text
from iotd.convert.samples import sequences
from iotd.errors import InvalidInput
from iotd.model import Model
from iotd.model.package import Quality
from iotd.ops.bench import Figure

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
T = TypeVar("T")
Advance = Callable[[int], None]
LENGTH = 512
"""Tokens of a text that are read behind each other."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What rounding a matrix adds to what it computes."""

    name: str
    noise: float
    """Squared error of its product by the product's own square, with the inputs that it has in float32."""

    @property
    def layer(self) -> int:
        return int(self.name.split(".")[2])

    @property
    def kind(self) -> str:
        """Such as `mlp.down_proj`."""
        return self.name.split(".", 3)[3]


def texts_of(model: Model, on: Path | None, n_tokens: int) -> list[Text]:
    """Held-back texts of the project's own, or those of a file, each behind a line `## KIND`. Raises InvalidInput."""
    if on is None:
        return sequences(model.tokenizer, model.chat, n_tokens=4 * n_tokens, length=LENGTH).held
    parts = _parts(on)
    cut = [Text(kind, np.array(model.tokenizer.encode(text), np.int64)) for kind, text in parts]
    found = [Text(text.kind, text.ids[at : at + LENGTH]) for text in cut for at in range(0, len(text.ids), LENGTH)]
    long_enough = [text for text in found if len(text.ids) > 1]
    if not long_enough:
        raise InvalidInput(f"{on} has no text of two tokens or more to measure on")
    return long_enough


def measure(
    model: Model, texts: Sequence[Text], reference: Iterator[Iterator[Floats]], advance: Advance
) -> list[Quality]:
    """reference: of each text the logits at its scored positions, ROWS at a time."""

    def parts() -> Iterator[tuple[str, Divergence]]:
        for text, expected in zip(texts, reference, strict=True):
            rows = scored(len(text.ids))
            targets = text.ids[rows.start + 1 :]
            for n, (wanted, found) in enumerate(zip(expected, logits_along(model, text.ids, rows), strict=True)):
                yield text.kind, divergence(wanted, found, targets[n * ROWS : n * ROWS + ROWS])
            advance(len(text.ids))

    return by_kind(parts())


def logits_along(model: Model, ids: Ints, rows: slice) -> Iterator[Floats]:
    """Logits behind the tokens of a text at `rows`, ROWS at a time, float32 [≤ ROWS, V]."""
    state = model.new_state(len(ids))
    if rows.start:
        model.prefill(state, ids[: rows.start], logits=False)
    for start in range(rows.start, rows.stop, ROWS):
        yield model.logits_along(state, ids[start : min(start + ROWS, rows.stop)])


def of_package(reference: Model, texts: Sequence[Text]) -> Iterator[Iterator[Floats]]:
    """The logits of a float32 package."""
    return (logits_along(reference, text.ids, scored(len(text.ids))) for text in texts)


def of_checkpoint(checkpoint: Path, texts: Sequence[Text]) -> Iterator[Iterator[Floats]]:
    """The logits of a checkpoint, in float32."""
    stack = open_stack(checkpoint)
    with tempfile.TemporaryDirectory() as work:
        hidden = Layers(stack, [text.ids for text in texts], Path(work)).hidden(FLOAT)
    logits = float_logits(stack.head() or stack.embedding())
    start = 0
    for text in texts:
        rows = scored(len(text.ids))
        part = hidden[start + rows.start : start + rows.stop]
        yield (logits(part[at : at + ROWS]) for at in range(0, len(part), ROWS))
        start += len(text.ids)


def costs(package: Path, checkpoint: Path, texts: Sequence[Text]) -> Iterator[Cost]:
    """Of each rounded matrix, in the order of the layers."""
    stack, packaged = open_stack(checkpoint), Packaged(package)
    with tempfile.TemporaryDirectory() as work:
        layers = Layers(stack, [text.ids for text in texts], Path(work))
        stream = layers.embedded(FLOAT)
        for i in range(stack.n_layers):
            for moment, matrices in layers.inputs(i, stream):
                for name, weight in matrices.items():
                    if name in packaged:
                        exact = weight.read(0, weight.rows)
                        yield Cost(name, _power(packaged.matrix(name) - exact, moment) / _power(exact, moment))
            stream = layers.through(i, stream, FLOAT)


def _power(weight: Floats, moment: Floats) -> float:
    """E|W·x|² of inputs with that second moment."""
    return float(np.einsum("rk,rk->", weight @ moment, weight))


def _parts(on: Path) -> list[tuple[str, str]]:
    try:
        text = on.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot read {on}: {error}") from error
    found = re.split(r"^## +(.+?) *$\n?", text, flags=re.MULTILINE)
    return [("text", found[0]), *zip(found[1::2], found[2::2], strict=True)]


def cost_lines(costs: Sequence[Cost]) -> Iterator[str]:
    """Layer by layer the matrix that adds most noise, and then each kind of matrix over all layers."""
    if not costs:
        return
    yield ""
    yield f"{'layer':<8}{'noisiest matrix':<28}{'noise':>8}"
    for layer, of_layer in _grouped(costs, lambda cost: cost.layer).items():
        worst = max(of_layer, key=lambda cost: cost.noise)
        yield f"{layer:<8}{worst.kind:<28}{worst.noise:>8.2%}"
    yield ""
    yield f"{'matrix':<28}{'mean':>8}{'most':>8}"
    for kind, of_kind in _grouped(costs, lambda cost: cost.kind).items():
        noises = [cost.noise for cost in of_kind]
        yield f"{kind:<28}{np.mean(noises):>8.2%}{max(noises):>8.2%}"


def figures(found: Sequence[Quality], costs: Sequence[Cost]) -> Iterator[Figure]:
    """As a plot has them: the divergence by kind of text, and the noise of each kind of matrix over the layers."""
    for one in found:
        yield _figure("divergence", "nats", one.kld_mean, one.kind)
        yield _figure("same likeliest token", "%", 100 * one.top1, one.kind)
    for cost in costs:
        part, _, name = cost.kind.partition(".")
        yield _figure(f"noise of {part}", "%", 100 * cost.noise, name, at=1 + cost.layer)


def _figure(chart: str, unit: str, value: float, engine: str, at: int = 0) -> Figure:
    return Figure(chart, unit, value, value, value, engine=engine, chart=chart, at=at)


def _grouped(costs: Sequence[Cost], key: Callable[[Cost], T]) -> dict[T, list[Cost]]:
    groups: dict[T, list[Cost]] = {}
    for cost in costs:
        groups.setdefault(key(cost), []).append(cost)
    return groups
