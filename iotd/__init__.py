"""iotd: a warm vision-language model for the sensors around a small board, answering inside a time budget."""

import os

# Read by onnxruntime when it is imported: without it, its wheels report usage to their maker, and keep files for that.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
