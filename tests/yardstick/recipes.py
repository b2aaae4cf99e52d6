"""What the yardstick compares: ways to write the graphs of a stack. Knows no metric."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from yardstick.grids import Q4_K, Q6_K, Grid, on_grid
from yardstick.stacks import LlamaStack

from iotd.convert.graph import GraphWriter
from iotd.convert.weights import Matrix
from iotd.model.package import Bits, Block, TableEntry


Writer = Callable[[Path], GraphWriter]
"""Opens a graph to be written."""


class GridWriter(GraphWriter):
    """Writes matrices as one of llama.cpp's grids holds them, in float32, and counts the bits that its files would take."""

    def __init__(self, path: Path, n_layers: int) -> None:
        super().__init__(path, bits=32, block=128)
        self.nbits = 0.0
        self.n_weights = 0
        self._n_layers = n_layers

    def table(self, name: str, weight: Matrix) -> TableEntry:
        grid = q4_k_m(name, self._n_layers)
        self.nbits += grid.nbits * weight.rows * weight.columns
        self.n_weights += weight.rows * weight.columns
        return super().table(
            name, Matrix(weight.rows, weight.columns, lambda start, stop: on_grid(weight.read(start, stop), grid))
        )


def q4_k_m(name: str, n_layers: int) -> Grid:
    """Which grid llama.cpp's mixture Q4_K_M has for a matrix: the finer one for the table and half of the v and down."""
    if not name.startswith("text.layers."):
        return Q6_K
    i, eighth = int(name.split(".")[2]), n_layers // 8
    more = i < eighth or i >= 7 * n_layers // 8 or (i - eighth) % 3 == 2
    return Q6_K if more and name.endswith(("v_proj", "down_proj")) else Q4_K


def size(path: Path) -> tuple[float, int]:
    """Bits that the quantised matrices of a graph take in its files, scales included, and how many weights they are."""
    graph = onnx.load(path, load_external_data=False).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    nbits, n_weights = 0, 0
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            continue
        sides = {attribute.name: attribute.i for attribute in node.attribute}
        n_weights += sides["K"] * sides["N"]
        for name in node.input[1:3]:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(stored[name].data_type)
            nbits += 8 * dtype.itemsize * int(np.prod(stored[name].dims))
    return nbits, n_weights


def _plain(bits: Bits, block: Block = 128) -> Callable[[LlamaStack], Writer]:
    return lambda _: lambda path: GraphWriter(path, bits=bits, block=block)


RECIPES: dict[str, Callable[[LlamaStack], Writer]] = {
    "fp32": _plain(32),
    "none": _plain(4),
    "none-32": _plain(4, 32),
    "q4_k_m": lambda stack: lambda path: GridWriter(path, stack.n_layers),
}
