"""What a checkpoint's tokenizer, and the trie of an answer's form, take in memory and time in a process of their own.

python tests/measure_vocabulary.py TOKENIZER_JSON      (also gzipped)
"""

import gzip
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iotd.events import Format
from iotd.model.grammar import Grammars
from iotd.model.tokenizer import Tokenizer

SCHEMA = json.dumps({"type": "object", "properties": {"open": {"type": "boolean"}}, "required": ["open"]})
TEXT = "[14:03:05] kitchen temperature 23.4 °C\nIst die Haustür offen? 厨房的窗户呢？\n" * 200


def resident_mb() -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def taken(what: str, work: Callable[[], Any]) -> Any:
    """What the work returns. Tells the memory it leaves behind, and the processor's time: the machine may be shared."""
    before_mb, began_s = resident_mb(), time.process_time()
    result = work()
    tell(f"{what}: {time.process_time() - began_s:.2f} s, {resident_mb() - before_mb:.1f} MB")
    return result


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def measure(compiled: Path) -> None:
    tokenizer = taken("open the tokenizer", lambda: Tokenizer.open(compiled))
    taken(f"tokenize {len(TEXT)} characters", lambda: tokenizer.encode(TEXT))
    taken("import llguidance", lambda: __import__("llguidance"))
    grammars = Grammars(tokenizer, [tokenizer.vocab_size - 1])
    taken("compile the first form, with the trie", lambda: grammars.constraint(Format("json_schema", (SCHEMA,)), 64))
    taken("compile another", lambda: grammars.constraint(Format("regex", ("[ab]+",)), 64))


if __name__ == "__main__":
    source = Path(sys.argv[1])
    if source.suffix == ".bin":
        measure(source)
    else:
        from iotd.convert.tokenizer import compile_tokenizer

        with tempfile.TemporaryDirectory() as folder:
            compiled = Path(folder) / "tokenizer.bin"
            content = source.read_bytes()
            compile_tokenizer(json.loads(gzip.decompress(content) if source.suffix == ".gz" else content), compiled)
            tell(f"{Tokenizer.open(compiled).vocab_size} tokens, {compiled.stat().st_size / 1e6:.1f} MB on disk")
            subprocess.run([sys.executable, __file__, str(compiled)], check=True)
