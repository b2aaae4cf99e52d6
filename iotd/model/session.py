"""How iotd opens onnxruntime sessions. The only place that sets their options."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from iotd.errors import PackageError

OpenGraph = Callable[[Path], ort.InferenceSession]
"""Opens one graph of a package. Raises PackageError."""


@dataclass(frozen=True, slots=True)
class Threads:
    """The compute threads of a session: the one that runs it, and those that it starts."""

    count: int = 2
    spinning: bool = True
    """Those started wait for work in a loop while the model runs, and sleep between runs; else they sleep in both."""
    affinity: bool = False
    """Each of those started keeps to a core of its own: the last ones, as the first is busiest with everything else."""

    @classmethod
    def of_all_cores(cls) -> "Threads":
        """One for each core that this process may use: for work that nothing else waits for."""
        return cls(len(os.sched_getaffinity(0)))

    @property
    def entries(self) -> dict[str, str]:
        """In onnxruntime's words."""
        entries = {"session.intra_op.allow_spinning": str(int(self.spinning))}
        if self.spinning:
            entries["session.force_spinning_stop"] = "1"  # else they take their cores for 50 ms after each run
        cores = sorted(os.sched_getaffinity(0))
        if self.affinity and self.count > 1 and len(cores) > 1:
            # One for each thread but the caller's; onnxruntime counts cores from 1.
            last = cores[1:][1 - self.count :]
            pinned = [str(1 + last[n % len(last)]) for n in range(self.count - 1)]
            entries["session.intra_op_thread_affinities"] = ";".join(pinned)
        return entries


def open_session(
    path: Path,
    threads: Threads,
    *,
    save_as: Path | None = None,
    profile: Path | None = None,
    entries: Mapping[str, str] = {},
) -> ort.InferenceSession:
    """Open a graph of a package on the CPU.

    save_as: where to write it as it was optimised. profile: where to write what each operator takes, up to the
    session's `end_profiling`; onnxruntime adds the time to the name. entries: onnxruntime's session configuration.
    Raises PackageError where onnxruntime refuses the graph, such as one with operators that it does not know.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads.count
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # one plan for each length of a run takes memory, and no time is saved by it
    if save_as is not None:
        options.optimized_model_filepath = str(save_as)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    for key, value in (threads.entries | dict(entries)).items():
        options.add_session_config_entry(key, value)
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no public base class
        raise PackageError(f"onnxruntime {ort.__version__} cannot open {path}: {error}") from error
