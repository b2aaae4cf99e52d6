"""Reads the rounded matrices of a package's decoder back, for comparing them with what they were made of."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from iotd.convert.quantize import Blocks, dequantize
from iotd.errors import PackageError
from iotd.model.package import DECODER
from iotd.model.table import SCALES, widened

Floats = NDArray[np.float32]


class Packaged:
    """The matrices of one package by their names."""

    def __init__(self, folder: Path) -> None:
        """Raises PackageError where the decoder's graph cannot be read."""
        self._folder = folder
        try:
            graph = onnx.load(str(folder / DECODER), load_external_data=False).graph
        except Exception as error:  # protobuf's errors share no base class
            raise PackageError(f"cannot read {folder / DECODER}: {error}") from error
        self._stored = {tensor.name: tensor for tensor in graph.initializer}
        products = (node for node in graph.node if node.op_type == "MatMulNBits")
        self._sides = {
            node.input[1].removesuffix(".codes"): {attribute.name: attribute.i for attribute in node.attribute}
            for node in products
        }

    def __contains__(self, name: str) -> bool:
        return name in self._sides

    def matrix(self, name: str) -> Floats:
        """What the codes stand for, float32 [rows, columns]."""
        sides = self._sides[name]
        codes = self._read(f"{name}.codes", np.dtype(np.uint8))
        kept = "float32" if self._stored[f"{name}.scales"].data_type == onnx.TensorProto.FLOAT else "bfloat16"
        scales = widened(self._read(f"{name}.scales", SCALES[kept]))
        return dequantize(Blocks(codes, scales, sides["bits"], sides["K"]))

    def _read(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        tensor = self._stored[name]
        shape = tuple(tensor.dims)
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return np.frombuffer(tensor.raw_data, dtype).reshape(shape)
        place = {entry.key: entry.value for entry in tensor.external_data}
        path = self._folder / place["location"]
        return np.fromfile(path, dtype, int(np.prod(shape)), offset=int(place["offset"])).reshape(shape)
