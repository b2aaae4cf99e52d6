"""How iotd opens onnxruntime sessions. The only place that sets their options."""

from pathlib import Path

import onnxruntime as ort

from iotd.errors import PackageError


def open_session(path: Path, threads: int) -> ort.InferenceSession:
    """Open a graph of a package on the CPU with `threads` compute threads.

    Raises PackageError where onnxruntime refuses the graph, such as one with operators that it does not know.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no public base class
        raise PackageError(f"onnxruntime {ort.__version__} cannot open {path}: {error}") from error
