"""The process of a peer that is a library: llama-cpp-python for a `.gguf` file, onnxruntime-genai for a folder.

It reads requests from standard input and replies on standard output, one JSON object a line; the first reply says that
the model is open. The only place that imports these libraries, neither of which iotd brings.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Protocol

PROVIDERS = {"llama_cpp": "llama-cpp-python", "onnxruntime_genai": "onnxruntime-genai"}
"""What to install for a module."""


class Library(Protocol):
    def prefill(self, ids: list[int], n_predict: int) -> None:
        """Read a prompt anew, up to the first token after it. n_predict: how many follow that one."""

    def step(self) -> None:
        """One more token, the likeliest."""


class LlamaCpp:
    def __init__(self, path: Path, threads: int, capacity: int) -> None:
        from llama_cpp import Llama

        self._llama = Llama(str(path), n_ctx=capacity, n_threads=threads, n_threads_batch=threads, verbose=False)

    def prefill(self, ids: list[int], n_predict: int) -> None:
        self._llama.reset()
        self._llama.eval(ids)
        self._token = self._llama.sample(temp=0.0)

    def step(self) -> None:
        self._llama.eval([self._token])
        self._token = self._llama.sample(temp=0.0)


class Genai:
    def __init__(self, path: Path, threads: int, capacity: int) -> None:
        import onnxruntime_genai as genai

        config = genai.Config(str(path))
        session = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
        self._genai = genai
        self._model = genai.Model(config)

    def prefill(self, ids: list[int], n_predict: int) -> None:
        n_tokens = len(ids) + n_predict + 1
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=n_tokens, min_length=n_tokens)
        self._generator = self._genai.Generator(self._model, params)
        self._generator.append_tokens(ids)
        self._generator.generate_next_token()

    def step(self) -> None:
        self._generator.generate_next_token()


def main(path: Path, threads: int, capacity: int) -> None:
    """Serve until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no reply
    try:
        library: Library = (Genai if path.is_dir() else LlamaCpp)(path, threads, capacity)
        print("{}", file=replies)
        for line in sys.stdin:
            print(json.dumps(_measured(library, **json.loads(line))), file=replies)
    except ModuleNotFoundError as error:
        provider = PROVIDERS.get(error.name or "", error.name)
        print(json.dumps({"error": f"it needs {error.name}: pip install {provider}"}), file=replies)
    except Exception as error:  # noqa: BLE001 - the edge of a process: whoever reads the reply raises it again
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=replies)


def _measured(library: Library, ids: list[int], n_predict: int) -> dict[str, float]:
    began_s = time.perf_counter()
    library.prefill(ids, n_predict)
    read_s = time.perf_counter()
    for _ in range(n_predict):
        library.step()
    return {"prefill_s": read_s - began_s, "decode_s": time.perf_counter() - read_s}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
