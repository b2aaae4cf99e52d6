"""The first measurements on a machine, from which the first plans are made. Later ones come from the work itself."""

from collections.abc import Callable, Iterator

import numpy as np

from iotd.engine.costs import Costs
from iotd.events import Sampling
from iotd.model import Model
from iotd.model.state import State

LIMIT_S = 3.0
"""No measurement is begun that would end later, by what is known so far."""
STEPS = 3
"""Tokens drawn at a position; more of them tell how far apart they lie."""
IMAGE_SIDE = 64
"""Pixels; the model makes its smallest size of them."""


def calibrate(
    model: Model, parent: State, fork: State, costs: Costs, chunk_tokens: int, clock: Callable[[], float]
) -> None:
    """Measure runs of several sizes behind short and long contexts, and an image; in 3 s at most, what is needed first.

    parent: has read something. Its rows are lent to `fork`; what stands in them behind its position is lost.
    """
    began_s = clock()
    for run, takes_s in _runs(model, parent, fork, costs, chunk_tokens):
        if clock() + takes_s() > began_s + LIMIT_S:
            return
        run()


Run = tuple[Callable[[], None], Callable[[], float]]
"""Something to be measured, and what it may take."""


def _runs(model: Model, parent: State, fork: State, costs: Costs, chunk_tokens: int) -> Iterator[Run]:
    far = max(parent.position, parent.available // 2)
    few, many = max(1, chunk_tokens // 4), chunk_tokens

    def at(position: int, n_tokens: int, steps: int) -> Run:
        def run() -> None:
            costs.rest()
            with costs.fork():
                parent.lend_to(fork)
            fork.skip(position - fork.position)
            tokens = [token % model.tokenizer.vocab_size for token in range(n_tokens)]
            with costs.read(n_tokens, fork.position, logits=steps > 0):
                logits = model.prefill(fork, tokens, logits=steps > 0)
            if logits is None:
                return
            generation = model.generation(fork, logits, Sampling(max_tokens=steps + 1))
            generation.step()
            while not generation.done:
                with costs.step(fork.position):
                    generation.step()

        return run, lambda: costs.read_s(n_tokens, position) + steps * costs.step_s(position)

    for position, n_tokens, steps in (
        (parent.position, many, STEPS),
        (far, many, STEPS),
        (parent.position, few, STEPS),
        (far, few, STEPS),
        (parent.position, many, 0),
        (parent.position, few, 0),
        (parent.position, 1, 2 * STEPS),
    ):
        yield at(position, n_tokens, steps)
    if model.has_vision:
        yield _image(model, costs)


def _image(model: Model, costs: Costs) -> Run:
    rgb = np.zeros((IMAGE_SIDE, IMAGE_SIDE, 3), np.uint8)
    n_tokens = model.image_tokens(model.image_grid(rgb.shape))

    def run() -> None:
        model.encode_image(rgb)  # the first one opens the graph
        costs.rest()
        with costs.image(n_tokens):
            model.encode_image(rgb)
        model.close_vision()

    return run, lambda: 3 * costs.image_s(n_tokens)
