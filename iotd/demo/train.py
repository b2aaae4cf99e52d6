"""Trains the demo's model: transformers' own Qwen3.5, small, on conversations about simulated homes. Resumable.

    python -m iotd.demo.train RUN                    # train in the folder RUN, or go on there
    python -m iotd.demo.train RUN --begin-with CHECKPOINT --stage settle    # a new run, from what another has learnt
    python -m iotd.demo.train RUN --export FOLDER    # write what it has learnt as a checkpoint, with the curve

The vision tower first learns to say what stands in each part of a picture; the text model to recall, from drills and
short conversations without pictures. Then both learn together, at last from conversations as long as the daemon's,
while probes ask at the end of each line what is so in the home by then. The layers that say what is in a part of a
picture, and what is so at a line's end, are thrown away.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3_5ForConditionalGeneration

from iotd.config import DEFAULT_SYSTEM
from iotd.convert.tokenizer import compile_tokenizer
from iotd.demo.batches import Row, Writer, drawn_scene
from iotd.demo.examples import HELD_OUT_SEED, Asked, Heard, Pace, conversation
from iotd.demo.muon import Muon
from iotd.demo.network import (
    HIDDEN,
    MERGE,
    N_LAYERS,
    PATCH,
    SIDE,
    export,
    grown,
    has_bfloat16,
    lengthen_memory,
    picture_inputs,
    quick,
    shape,
    train_tokenizer,
)
from iotd.demo.probes import CHOICES, WORTH
from iotd.demo.questions import SIDES, side_of
from iotd.demo.scene import COLOURS, KINDS, Scene
from iotd.engine.lines import reading_line

log = logging.getLogger("iotd.demo.train")


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the training. Tokens of a step: rows × length."""

    name: str
    steps: int
    rows: int
    length: int
    pace: Pace
    prompted: float = 0.0
    """Share of rows that begin with the daemon's system prompt."""
    drilled: float = 0.0
    """Share of rows that are drills of recall."""
    captioned: float = 0.0
    """Share of rows that are pictures with all that is in them."""
    sighted: bool = True
    """The vision tower learns, too: half of the time is its, and it is soon good enough."""
    rates: tuple[float, float] = (1.0, 1.0)
    """Of the learning rates, at its beginning and, falling evenly, at its end."""


_HARDER = (
    *(("value", 4.0), ("state", 3.0), ("any door", 2.0), ("any motion", 2.0)),
    *(("warmest", 4.0), ("coldest", 4.0), ("missing", 4.0)),
    *(("camera what", 3.5), ("camera whether", 2.5), ("camera how many", 2.5)),
    *(("camera colour", 3.5), ("camera where", 3.0)),
)
"""More of what takes longer to learn."""
_HARDEST = (*_HARDER, ("value", 5.0), ("warmest", 8.0), ("camera what", 4.0), ("camera where", 6.0))
"""Still more of what is learnt last; of a kind that is named twice, the second weight holds."""
STAGES = (
    Stage("vision", 750, 32, 0, Pace()),
    Stage("drill", 1500, 24, 128, Pace((1, 3), (1, 2), frames=0.0, mischief=0.0), drilled=0.5),
    Stage("short", 750, 16, 192, Pace((1, 3), (3, 6), frames=0.0, mischief=0.0), drilled=0.25),
    Stage(
        "pictures", 1500, 8, 384, Pace((1, 8), (3, 6), frames=0.2, kinds=_HARDER), 0.2, drilled=0.125, captioned=0.25
    ),
    Stage("questions", 1750, 12, 256, Pace((1, 5), (4, 8), frames=0.2, kinds=_HARDER), 0.1, sighted=False),
    Stage("whole", 1750, 4, 768, Pace(frames=0.15, kinds=_HARDER), 0.5, sighted=False),
    Stage("settle", 4800, 4, 768, Pace(frames=0.15, kinds=_HARDER), 0.7, rates=(1.0, 0.0)),
    Stage("polish", 6500, 4, 768, Pace(frames=0.15, kinds=_HARDEST), 0.7, rates=(0.7, 0.0)),
    Stage("hurry", 1000, 4, 768, Pace(frames=0.15, kinds=_HARDEST, hurried=0.4), 0.7, sighted=False, rates=(0.3, 0.0)),
)
CELLS_WORTH = 0.3
"""Of what the tower sees in a picture's parts, against 1 for a token of an answer."""
PROBES_WORTH = 0.02
"""Of one probe of a line, against 1 for a token of an answer."""
PEAK_RATE = 2e-3
MUON_RATE = 0.02
WARM_UP_STEPS = 100
SEED = 20261123
CHECKPOINT_EVERY = 250
LOG_EVERY = 25


class Trainer:
    """The model, its optimisers, and where in STAGES they are."""

    def __init__(self, folder: Path, stages: tuple[Stage, ...] = STAGES) -> None:
        self.folder = folder
        self.stages = stages
        self.done: dict[str, int] = {}
        torch.manual_seed(SEED)
        self.network = Qwen3_5ForConditionalGeneration(shape())
        lengthen_memory(self.network)
        self.cells = nn.Linear(HIDDEN, (1 + len(COLOURS) + len(SIDES)) * len(KINDS))
        self.probes = nn.Linear(HIDDEN, sum(CHOICES))
        self._matrices, self._others = _parameters(self.network)
        self._others += [*self.cells.parameters(), *self.probes.parameters()]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(self._matrices, MUON_RATE),
            torch.optim.AdamW(self._others, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def save(self) -> None:
        state = {
            "network": self.network.state_dict(),
            "cells": self.cells.state_dict(),
            "probes": self.probes.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "done": self.done,
        }
        torch.save(state, self.folder / "state.tmp")
        (self.folder / "state.tmp").rename(self.folder / "state.pt")

    def load(self) -> None:
        state = torch.load(self.folder / "state.pt")
        self.network.load_state_dict(state["network"])
        self.cells.load_state_dict(state["cells"])
        self.probes.load_state_dict(state["probes"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.done = state["done"]

    def begin_with(self, checkpoint: Path) -> None:
        known = Qwen3_5ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
        same_depth = len(known.model.language_model.layers) == N_LAYERS
        self.network.load_state_dict(known.state_dict() if same_depth else grown(known.state_dict(), self.network))

    def run(self, stage: Stage) -> None:
        begin = self.done.get(stage.name, 0)
        if begin >= stage.steps:
            return
        tally = _Tally()
        batches = _feed(stage, begin, self.folder / "tokenizer.json")
        began_s = time.monotonic()
        self.network.train()
        self.network.model.visual.requires_grad_(stage.sighted)
        for step, batch in zip(range(begin, stage.steps), batches, strict=False):
            self._set_rate(stage, step)
            loss = self._loss(stage, batch, tally)
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call] # torch has no type for it
            nn.utils.clip_grad_norm_([*self._matrices, *self._others], 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            tally.loss(float(loss.detach()))
            self.done[stage.name] = step + 1
            if (step + 1) % LOG_EVERY == 0:
                self._log(stage, step + 1, tally.take(), (time.monotonic() - began_s) / (step + 1 - begin))
            if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == stage.steps:
                self.save()

    def _set_rate(self, stage: Stage, step: int) -> None:
        rate = min(1.0, (step + 1) / WARM_UP_STEPS)
        begin, end = stage.rates
        rate *= begin + (end - begin) * step / stage.steps
        for optimizer, peak in zip(self.optimizers, (MUON_RATE, PEAK_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate

    def _loss(self, stage: Stage, batch: Any, tally: "_Tally") -> Tensor:
        if stage.name == "vision":
            return self._vision_loss(batch, tally)
        return self._text_loss(batch, tally, sighted=stage.sighted)

    def _text_loss(self, rows: list[Row], tally: "_Tally", *, sighted: bool) -> Tensor:
        ids = torch.from_numpy(np.stack([row.ids for row in rows]))
        positions = torch.from_numpy(np.stack([row.positions for row in rows], axis=1))
        worth = torch.from_numpy(np.stack([row.worth for row in rows]))[:, 1:]
        counts, wanted = worth > 0, ids[:, 1:]
        scenes = [scene for row in rows for scene in row.scenes]
        seen = picture_inputs([scene.rgb for scene in scenes]) if scenes else {}
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
            out = self.network.model(
                input_ids=ids, position_ids=positions, use_cache=False, output_hidden_states=True, **seen
            )
            logits = self.network.lm_head(out.last_hidden_state[:, :-1][counts])
        losses = F.cross_entropy(logits.float(), wanted[counts], reduction="none")
        hits = torch.zeros_like(counts)
        hits[counts] = logits.detach().argmax(-1) == wanted[counts]
        tally.answers(rows, hits.numpy())
        loss: Tensor = (losses * worth[counts]).sum() / worth.sum()
        if sighted and scenes:
            embeddings = out.hidden_states[0][ids == self.network.config.image_token_id]
            loss = loss + CELLS_WORTH * self._cells_loss(embeddings, scenes, tally)
        return loss + PROBES_WORTH * self._probe_loss(rows, out.hidden_states[N_LAYERS - 1], tally)

    def _probe_loss(self, rows: list[Row], hidden: Tensor, tally: "_Tally") -> Tensor:
        """What the last layer but one knows of the home where a line ends. hidden: [B, T, D]."""
        at = [(i, end) for i, row in enumerate(rows) for end, _ in row.lines]
        if not at:
            return hidden.new_zeros(())
        where = torch.tensor(at).T
        known = F.rms_norm(hidden[where[0], where[1]].float(), [HIDDEN])
        truth = torch.from_numpy(np.stack([known for row in rows for _, known in row.lines]))
        probes = zip(self.probes(known).split(CHOICES, -1), truth.T, strict=True)
        losses, right = [], []
        for (logits, wanted), worth in zip(probes, WORTH, strict=True):
            losses.append(worth * F.cross_entropy(logits, wanted, reduction="sum"))
            right.append((logits.detach().argmax(-1) == wanted)[wanted >= 0])
        tally.score("probes", torch.cat(right).float().mean().item())
        return torch.stack(losses).sum() / len(at)

    def _vision_loss(self, scenes: list[Scene], tally: "_Tally") -> Tensor:
        seen = picture_inputs([scene.rgb for scene in scenes])
        found = self.network.model.visual(seen["pixel_values"], grid_thw=seen["image_grid_thw"]).pooler_output
        return self._cells_loss(found, scenes, tally)

    def _cells_loss(self, found: Tensor, scenes: list[Scene], tally: "_Tally") -> Tensor:
        """What each merged token of the pictures, [n, D], holds: which kinds, of which colour and on which side."""
        split = [len(KINDS), len(KINDS) * len(COLOURS), len(KINDS) * len(SIDES)]
        kinds, colours, sides = self.cells(found).split(split, -1)
        cells = (torch.from_numpy(np.concatenate(part)) for part in zip(*map(_cells, scenes), strict=True))
        truth, paint, place = cells
        sure = truth != 0.5
        loss = (F.binary_cross_entropy_with_logits(kinds, truth, reduction="none") * sure).sum() / sure.sum()
        there = truth == 1
        if not there.any():
            return loss
        right = ((kinds > 0) == (truth > 0.5)) | ~sure
        tally.score("cells", right.all(-1).float().mean().item())
        tally.score("things", ((kinds > 0) & there).sum().item() / max(1, there.sum().item()))
        for name, logits, wanted in (("colours", colours, paint), ("sides", sides, place)):
            of_things = logits.unflatten(-1, (len(KINDS), -1))[there]
            tally.score(name, (of_things.argmax(-1) == wanted[there]).float().mean().item())
            loss = loss + 0.3 * F.cross_entropy(of_things, wanted[there])
        return loss

    def _log(self, stage: Stage, step: int, figures: dict[str, float], step_s: float) -> None:
        record = {"stage": stage.name, "step": step, "step_s": round(step_s, 4), **figures}
        with (self.folder / "log.jsonl").open("a") as out:
            out.write(json.dumps(record) + "\n")
        shown = " ".join(f"{name} {value:.3f}" for name, value in figures.items())
        log.info("%s %d/%d %.2f s: %s", stage.name, step, stage.steps, step_s, shown)


class _Tally:
    """Figures between two lines of the log."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = defaultdict(list)

    def loss(self, value: float) -> None:
        self._sums["loss"].append(value)

    def score(self, name: str, value: float) -> None:
        self._sums[name].append(value)

    def answers(self, rows: list[Row], right: np.ndarray) -> None:
        for row, hits in zip(rows, right, strict=True):
            if not row.answers:
                known = row.worth[1:] == 1
                self._sums["captions" if row.pictures else "recall"].append(
                    float(hits[known].mean()) if known.any() else 1.0
                )
            for begin, end, question in row.answers:
                whole = float(hits[begin - 1 : end - 1].all())
                self._sums["all"].append(whole)
                self._sums[question.kind].append(whole)

    def take(self) -> dict[str, float]:
        figures = {name: round(float(np.mean(values)), 4) for name, values in self._sums.items()}
        self._sums.clear()
        return figures


def _parameters(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices between hidden layers, for Muon, and the rest, for AdamW."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        outer = any(part in name for part in ("embed", "lm_head", "in_proj_a", "in_proj_b"))
        (matrices if parameter.ndim == 2 and not outer else others).append(parameter)
    return matrices, others


def _cells(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each merged token and kind, [n, KINDS]: whether it is there (1, 0, 0.5 at the rim), its colour, its side."""
    edge = PATCH * MERGE
    covered = np.zeros((SIDE * SIDE, len(KINDS)), np.float32)
    paint, place = (np.zeros((SIDE * SIDE, len(KINDS)), np.int64) for _ in range(2))
    colours = [*COLOURS]
    for thing in scene.things:
        kind = KINDS.index(thing.kind)
        left, top, right, bottom = thing.box
        area = min((right - left) * (bottom - top), edge * edge)
        for row in range(SIDE):
            for column in range(SIDE):
                wide = min(right, (column + 1) * edge) - max(left, column * edge)
                high = min(bottom, (row + 1) * edge) - max(top, row * edge)
                part = max(0, wide) * max(0, high) / area
                if part > 0:
                    covered[row * SIDE + column, kind] = 1.0 if part > 0.3 else 0.5
        paint[:, kind] = colours.index(thing.colour)
        place[:, kind] = SIDES.index(side_of(thing, scene))
    return covered, paint, place


def _batch(stage: Stage, step: int, writer: Writer) -> Any:
    """What step `step` of a stage learns from."""
    seed = np.random.SeedSequence((SEED, *stage.name.encode(), step)).generate_state(2, np.uint64)
    base = int(seed[0]) % (HELD_OUT_SEED // 2)
    if stage.name == "vision":
        rng = np.random.default_rng(base)
        return [drawn_scene(rng) for _ in range(stage.rows)]
    rows = []
    for i in range(stage.rows):
        row_seed = (base + i) % HELD_OUT_SEED
        if i < stage.drilled * stage.rows:
            rows.append(writer.drill(row_seed, stage.length, 2 + stage.length // 32))
            continue
        if i >= (1 - stage.captioned) * stage.rows:
            rows.append(writer.captions(row_seed, stage.length))
            continue
        rows.append(writer.row(row_seed, stage.length, _varied(stage, row_seed), prompted=stage.prompted))
    return rows


_PACES = (((1, 8), (4, 8)), ((8, 18), (5, 9)), ((18, 28), (10, 14)))
"""Events and questions of a round in conversations long enough: from many short rounds to a single one, in which the
daemon's context has everything ahead of any question."""


def _varied(stage: Stage, seed: int) -> Pace:
    if stage.length < 700:
        return stage.pace
    events, questions = _PACES[seed % len(_PACES)]
    return replace(stage.pace, events=events, questions=questions)


def _feed(stage: Stage, begin: int, tokenizer: Path) -> Iterator[Any]:
    """The batches from step `begin` on, made ahead by another process."""
    context = get_context("spawn")
    line = context.Queue(maxsize=8)
    maker = context.Process(target=_make, args=(stage, begin, tokenizer, line), daemon=True)
    maker.start()
    try:
        while True:
            yield line.get(timeout=120)
    finally:
        maker.terminate()


def _make(stage: Stage, begin: int, tokenizer: Path, line: Any) -> None:
    os.nice(5)
    torch.set_num_threads(1)
    writer = Writer(tokenizer.with_suffix(".bin"), SIDE)
    for step in range(begin, stage.steps):
        line.put(_batch(stage, step, writer))


def _corpus() -> Iterator[str]:
    yield from [DEFAULT_SYSTEM + "\nuser\nassistant\nsystem\n"] * 3000
    for seed in range(800):
        events = conversation(seed, Pace(frames=0.05))
        for _ in range(60):
            event = next(events)
            if isinstance(event, Asked):
                yield event.question.text
                yield event.question.answer
            elif isinstance(event, Heard):
                yield reading_line(event.observation())
    for day in ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"):
        yield from [f"[2026-01-01 {day}]\n"] * 20


def plot(history: Path, out: Path) -> None:
    """Draw the loss, and how many fresh questions were answered word for word, over all steps of a run."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "iotd"
    from matplotlib import pyplot

    records = [json.loads(line) for line in history.read_text().splitlines()]
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1))
    step = 0
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for stage in STAGES:
        of_stage = [record for record in records if record["stage"] == stage.name]
        if not of_stage:
            continue  # learnt in a run before this one
        for record in of_stage:
            for name in ("loss", "all", "value", "state", "coldest", "camera what", "camera where", "probes"):
                if name in record:
                    curves[name].append((step + record["step"], record[name]))
        above.axvline(step, color="0.8", linewidth=0.8)
        above.text(step, 1.02, stage.name, fontsize=8)
        step += stage.steps
    for name, points in curves.items():
        axes = below if name == "loss" else above
        axes.plot(*zip(*points, strict=True), label=name, linewidth=0.8)
    above.set_ylabel("right, word for word")
    below.set_ylabel("loss")
    below.set_ylim(0, 1)
    below.set_xlabel("step")
    above.legend(fontsize=7, loc="lower right")
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run; one that is there is gone on with")
    parser.add_argument("--export", type=Path, help="write the checkpoint there and stop")
    parser.add_argument(
        "--begin-with", type=Path, metavar="CHECKPOINT", help="a new run begins with what that one knows"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="a third faster; needs a C++ compiler")
    parser.add_argument("--stage", action="append", help="only these stages")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    torch.set_num_threads(args.threads)
    args.run.mkdir(parents=True, exist_ok=True)
    tokenizer = args.run / "tokenizer.json"
    if not tokenizer.exists():
        if args.begin_with:
            shutil.copy(args.begin_with / "tokenizer.json", tokenizer)
        else:
            train_tokenizer(_corpus(), tokenizer)
        compile_tokenizer(tokenizer, tokenizer.with_suffix(".bin"))
    trainer = Trainer(args.run)
    if (args.run / "state.pt").exists():
        trainer.load()
    elif args.begin_with:
        trainer.begin_with(args.begin_with)
    if args.export:
        export(trainer.network, tokenizer, args.export)
        plot(args.run / "log.jsonl", args.export / "curve.svg")
        return
    if args.compile:
        for layer in trainer.network.model.language_model.layers:
            layer.compile(dynamic=False)
    log.info("%.2f M parameters", sum(p.numel() for p in trainer.network.parameters()) / 1e6)
    with quick():
        for stage in STAGES:
            if not args.stage or stage.name in args.stage:
                trainer.run(stage)


if __name__ == "__main__":
    main()
