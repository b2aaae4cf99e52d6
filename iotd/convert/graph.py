"""Writes an ONNX graph while its weights stream to the external data file beside it.

Knows operators and storage, not architectures: `convert.decoder` and `convert.vision` say what to compute.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from iotd.convert.rounding import Grid, Rounding
from iotd.convert.weights import Matrix, slices
from iotd.errors import CheckpointError
from iotd.model.package import TableEntry

MS = "com.microsoft"
OPSET = 21
INLINE_NBYTES = 4096
ALIGNMENT = 4096  # onnxruntime maps external data by pages
DTYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int64): TensorProto.INT64,
}


@dataclass(frozen=True, slots=True)
class Linear:
    """A product with a matrix in a graph, and the value that is multiplied by it."""

    x: str
    weight: Matrix


class GraphWriter:
    """One graph under construction. Values are named by strings; weights go to `<path>.data` at once."""

    def __init__(self, path: Path, rounding: Rounding) -> None:
        self.path = path
        self.linears: dict[str, Linear] = {}
        """The products so far, by the name of their matrix."""
        self._rounding = rounding
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._data: BinaryIO = self.data_path.open("wb")

    @property
    def data_path(self) -> Path:
        return self.path.with_name(self.path.name + ".data")

    def input(self, name: str, dtype: int, shape: tuple[int | str, ...]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: int, shape: tuple[int | str, ...]) -> str:
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def op(self, kind: str, *inputs: str, out: str = "", domain: str = "", **attributes: Any) -> str:
        """Add a node with one output and return that output's name."""
        return self.ops(kind, *inputs, outs=(out or f"{kind}.{len(self._nodes)}",), domain=domain, **attributes)[0]

    def ops(
        self, kind: str, *inputs: str, outs: tuple[str, ...], domain: str = "", **attributes: Any
    ) -> tuple[str, ...]:
        """Add a node with the outputs named, "" for one that is not wanted."""
        name = next(out for out in outs if out)
        self._nodes.append(helper.make_node(kind, inputs, outs, name=f"{kind}/{name}", domain=domain, **attributes))
        return outs

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """An initializer, stored once for each name."""
        if name in self._initializers:
            return name
        if values.nbytes <= INLINE_NBYTES:
            self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
        else:
            self._declare(name, DTYPES[values.dtype], values.shape, self._write(values))
        return name

    def linear(
        self, x: str, name: str, weight: Matrix, *, bias: NDArray[np.float32] | None = None, out: str = ""
    ) -> str:
        """Store a weight and multiply by it: x [..., columns] · weightᵀ (+ bias) → [..., rows]."""
        self.linears[name] = Linear(x, weight)
        if self._rounding.grid(name).bits == 16:
            return self._product(x, self._halves(name, weight, x), name, bias, out)
        self.table(name, weight)
        return self.matmul(x, name, weight.columns, weight.rows, bias=bias, out=out)

    def matmul(
        self, x: str, name: str, columns: int, rows: int, *, bias: NDArray[np.float32] | None = None, out: str = ""
    ) -> str:
        """Multiply by a matrix that `table` stored."""
        grid = self._rounding.grid(name)
        if grid.bits == 32:
            return self._product(x, name, name, bias, out)
        # Kept in 16 bits, and widened once when the graph is opened: the kernel takes float32 only.
        scales = self.op("Cast", f"{name}.scales", to=TensorProto.FLOAT)
        inputs = [x, f"{name}.codes", scales]
        if bias is not None:
            inputs += ["", "", self.constant(f"{name}.bias", bias)]
        sizes = {"K": columns, "N": rows, "bits": grid.bits, "block_size": grid.block}
        return self.op("MatMulNBits", *inputs, out=out, domain=MS, accuracy_level=4, **sizes)

    def table(self, name: str, weight: Matrix, n_used: int | None = None) -> TableEntry:
        """Store a matrix as it is to be rounded, and say where it lies. n_used: the graph has its first rows alone.

        Not for float16, of which no rows are looked up.
        """
        grid, rows = self._rounding.grid(name), n_used or weight.rows
        codes_offset = self._align()
        if grid.bits == 32:
            for start, stop in slices(weight):
                self._data.write(weight.read(start, stop).tobytes())
            self._declare(name, TensorProto.FLOAT, (rows, weight.columns), codes_offset, of=weight.rows)
            return self._entry(grid, codes_offset, 0)
        scales = []
        for blocks in self._rounding.blocks(name, weight):
            self._data.write(blocks.codes.tobytes())
            scales.append(blocks.scales)
        shape = (rows, *blocks.codes.shape[1:])
        self._declare(f"{name}.codes", TensorProto.UINT8, shape, codes_offset, of=weight.rows)
        scales_offset = self._align()
        for part in scales:
            self._data.write(bfloat16(part).tobytes())
        shape = (rows, scales[0].shape[1])
        self._declare(f"{name}.scales", TensorProto.BFLOAT16, shape, scales_offset, of=weight.rows)
        return self._entry(grid, codes_offset, scales_offset)

    def _halves(self, name: str, weight: Matrix, x: str) -> str:
        """Store a matrix in float16, and widen it each time that x is there to be multiplied by it.

        It is reshaped to what it is, by a shape [0, 0] that x must be known for. Else onnxruntime would widen it once
        when the graph is opened and keep that in memory, or all matrices at the beginning of each run.
        """
        offset = self._align()
        for start, stop in slices(weight):
            self._data.write(halves(name, weight.read(start, stop)).tobytes())
        self._declare(name, TensorProto.FLOAT16, (weight.rows, weight.columns), offset)
        shape = self.op("Shape", x, start=-2)
        return self.op("Cast", self.op("Reshape", name, self.op("Sub", shape, shape)), to=TensorProto.FLOAT)

    def _product(self, x: str, weight: str, name: str, bias: NDArray[np.float32] | None, out: str) -> str:
        product = self.op("FusedMatMul", x, weight, out="" if bias is not None else out, domain=MS, transB=1)
        return product if bias is None else self.op("Add", product, self.constant(f"{name}.bias", bias), out=out)

    def show(self, value: str, *shape: int | str) -> None:
        """Make an output, float32, of a value that is one of a node."""
        if all(output.name != value for output in self._outputs):
            self.output(value, TensorProto.FLOAT, shape)

    def __enter__(self) -> "GraphWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._data.close()
        if kind is None:
            self._save()

    def _save(self) -> None:
        """Write the graph itself. Its weights are on disk already."""
        used = {name for node in self._nodes for name in node.input}
        initializers = [tensor for name, tensor in self._initializers.items() if name in used]
        graph = helper.make_graph(self._nodes, self.path.stem, self._inputs, self._outputs, initializers)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MS, 1)]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="iotd", ir_version=10)
        self.path.write_bytes(model.SerializeToString())

    def _entry(self, grid: Grid, codes_offset: int, scales_offset: int) -> TableEntry:
        assert grid.bits != 16
        return TableEntry(
            file=self.data_path.name,
            bits=grid.bits,
            block=grid.block,
            scales="bfloat16",
            codes_offset=codes_offset,
            scales_offset=scales_offset,
        )

    def _align(self) -> int:
        self._data.write(b"\0" * (-self._data.tell() % ALIGNMENT))
        return self._data.tell()

    def _write(self, values: NDArray[Any]) -> int:
        offset = self._align()
        self._data.write(np.ascontiguousarray(values).tobytes())
        return offset

    def _declare(self, name: str, kind: int, shape: tuple[int, ...], offset: int, of: int | None = None) -> None:
        """What was written from `offset` on, or of so many rows of it the first that are in `shape`."""
        tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        length = self._data.tell() - offset
        if of is not None:
            length = length // of * shape[0]
        for key, value in (("location", self.data_path.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self._initializers[name] = tensor


def halves(name: str, weight: NDArray[np.float32]) -> NDArray[np.float16]:
    """Rounded to float16. Raises CheckpointError where its range is too small."""
    with np.errstate(over="ignore"):
        found = weight.astype("<f2")
    if not np.isfinite(found).all():
        largest = np.finfo(np.float16).max
        raise CheckpointError(f"{name} holds weights beyond float16's {largest:.0f}: convert with the recipe fp32")
    return found


def bfloat16(scales: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Their upper halves, which is all there is of values that bfloat16 can represent."""
    return (scales.view(np.uint32) >> 16).astype("<u2")
