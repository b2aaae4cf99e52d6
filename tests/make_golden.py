"""Writes tests/golden: small checkpoints, and what transformers' own model says about them.

    python tests/make_golden.py [FOLDER]

Needs the `oracle` extra. A test marked `oracle` writes them again and compares.
"""

import sys
from pathlib import Path

import numpy as np
import oracle_checkpoints as oracle
import torch

GOLDEN = Path(__file__).parent / "golden"
N_TOKENS = 96
BEFORE, AFTER = [1, 2, 3], [4, 5, 6, 7]


def write(shape: oracle.Shape, folder: Path) -> None:
    """The checkpoint, and expected.npz: logits along a text, embeddings of an image and the logits behind it."""
    network = oracle.make(shape)
    oracle.save(network, shape, folder)
    random = np.random.default_rng(shape.seed)
    ids = random.integers(0, 256, N_TOKENS)
    rgb = random.integers(0, 256, (50, 70, 3), dtype=np.uint8)
    inputs = oracle.image_inputs(network, shape, rgb, BEFORE, AFTER)
    with torch.no_grad():
        features = network.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output[0]
        behind = network(**inputs).logits[0, -1]
    rounded = oracle.make(shape)
    oracle.round_weights(rounded)
    np.savez_compressed(
        folder / "expected.npz",
        ids=ids,
        logits=oracle.reference_logits(network, ids)[::8],
        int4_logits=oracle.reference_logits(rounded, ids)[::8],
        rgb=rgb,
        embeddings=features.numpy(),
        logits_behind_image=behind.numpy(),
    )


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN
    for shape in oracle.GOLDEN:
        write(shape, out / shape.name)


if __name__ == "__main__":
    main()
