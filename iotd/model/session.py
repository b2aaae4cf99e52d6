"""How iotd opens onnxruntime sessions. The only place that sets their options."""

from collections.abc import Callable, Mapping
from pathlib import Path

import onnxruntime as ort

from iotd.errors import PackageError

OpenGraph = Callable[[Path], ort.InferenceSession]
"""Opens one graph of a package. Raises PackageError."""


def open_session(
    path: Path,
    threads: int,
    *,
    save_as: Path | None = None,
    profile: Path | None = None,
    entries: Mapping[str, str] = {},
) -> ort.InferenceSession:
    """Open a graph of a package on the CPU with `threads` compute threads.

    save_as: where to write it as it was optimised. profile: where to write what each operator takes, up to the
    session's `end_profiling`; onnxruntime adds the time to the name. entries: onnxruntime's session configuration.
    Raises PackageError where onnxruntime refuses the graph, such as one with operators that it does not know.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # one plan for each length of a run takes memory, and no time is saved by it
    if save_as is not None:
        options.optimized_model_filepath = str(save_as)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no public base class
        raise PackageError(f"onnxruntime {ort.__version__} cannot open {path}: {error}") from error
