"""The papers' ablations at a tiny size: what keeps a method from collapse is taken away; what a smaller batch costs.

    python -m benchmarks.ablations [--seeds 0 1 2] [--variants NAME ...] [--images SHARDS]

Each run is one process of about a minute: the method's recipe in configs/small with a narrower network, an epoch of the
demo's shards (`make pretrain` makes them). Writes benchmarks/results/ablations.json and
ablations.md: the signs of the last logged line, kNN on held-back training images, and what the run's doctor says.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from largescale.cli import main as largescale
from largescale.config import load_config
from largescale.methods import METHODS
from largescale.methods.method import Output
from largescale.methods.mocov2 import MoCoV2
from largescale.observe.doctor import judge

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHARDS = ROOT / "data" / "shards" / "fashion-mnist-train"

STEPS, BATCH, IMAGES = 150, 64, 10_000
LINES = 5
"""Logged per run; kNN is measured at the last."""
TINY = [
    "model.width=16",
    "checkpoint.every_steps=0",
    "checkpoint.background=false",
    "evaluate.online_bank=2000",
    "evaluate.online_queries=1000",
    "train.precision=fp32",
]


@dataclass(frozen=True)
class Variant:
    """A recipe and what is different in it.

    Attributes:
        recipe: in configs/small.
        overrides: on top of TINY.
        batch: images per step; AdamW's rate goes with its square root.
        seen: images, in all steps; the same for all variants of a question.
        method: a name other than the recipe's, of CHANGED.
    """

    recipe: str
    overrides: Sequence[str] = ()
    batch: int = BATCH
    seen: int = STEPS * BATCH
    method: str = ""


@dataclass(frozen=True)
class Question:
    """What a paper takes away, and what it says happens.

    Attributes:
        claim: of the paper.
        variants: by name; the first is the method as it is.
        signs: columns of metrics.jsonl that tell.
        outcome: in words, where a table alone would mislead.
    """

    claim: str
    variants: dict[str, Variant]
    signs: Sequence[str] = ()
    outcome: str = ""


class CurrentKeysAreNegatives(MoCoV2):
    """MoCo whose keys join the queue before the loss, so that every positive is a negative too: a defect of public
    code.
    """

    def loss(self, inputs: dict[str, Tensor], ids: Tensor, step: int) -> Output:
        """The loss, after the queue has taken the keys."""
        keys, rows = inputs["keys"][0], self.queue.rows
        self.queue.rows = torch.cat([keys.to(rows.dtype), rows[len(keys) :]])
        return super().loss(inputs, ids, step)


CHANGED = {"mocov2-current-keys": CurrentKeysAreNegatives}
"""Methods that differ in more than settings."""

EASY = [
    *(f"data.augment.{name}=0" for name in ("rotate_degrees", "gamma", "gain", "blur", "noise", "erase")),
    "method.queue=128",
    "method.temperature=0.07",
]
"""A task that MoCo solves in a hundred steps."""

SOON = ["method.freeze_last_layer_epochs=0.1", "method.outputs=128", "method.momentum=0.98"]
NO_SHARPENING = ["method.teacher_temperature=0.1", "method.warmup_teacher_temperature=0.1"]

BATCHES, LONGER = (256, 16), 29_440


def with_batch(recipe: str, batch: int) -> Variant:
    """A method with another batch and as many images seen; queues stay, and what goes by the step goes by images."""
    queues = {
        "simclr": [],
        "mocov2": ["method.queue=1024", f"method.momentum={0.99 ** (batch / BATCH):.6g}"],
        "swav": [
            "method.queue=1024",
            "method.queue_start_step=0",
            f"method.freeze_prototypes_steps={45 * BATCH // batch}",
        ],
    }
    return Variant(recipe, queues[recipe], batch, LONGER)


def cut(variant: Variant, images: int) -> Variant:
    """The same batch in micro-batches of so many images, which the loss and BatchNorm do not look beyond."""
    return replace(variant, overrides=[*variant.overrides, f"train.accumulate={variant.batch // images}"])


QUESTIONS = {
    "SimSiam without stop-gradient": Question(
        "embeddings collapse to a point (arXiv 2011.10566, figure 2)",
        {
            "simsiam": Variant("simsiam"),
            "simsiam stop_gradient=false": Variant("simsiam", ["method.stop_gradient=false"]),
        },
        ["embedding_std", "agreement"],
    ),
    "BYOL without predictor": Question(
        "embeddings collapse (arXiv 2006.07733, table 5b)",
        {"byol": Variant("byol"), "byol predictor=false": Variant("byol", ["method.predictor=false"])},
        ["embedding_std", "agreement"],
    ),
    "VICReg without variance": Question(
        "embeddings collapse (arXiv 2105.04906, table 7)",
        {"vicreg": Variant("vicreg"), "vicreg variance=0": Variant("vicreg", ["method.variance=0"])},
        ["embedding_std", "agreement"],
    ),
    "Barlow Twins with lambda 0": Question(
        "dimensions are redundant and accuracy is lost (arXiv 2103.03230, figure 6)",
        {"barlow": Variant("barlow"), "barlow off_diagonal=0": Variant("barlow", ["method.off_diagonal=0"])},
        ["effective_rank", "embedding_std"],
    ),
    "MoCo with current keys as negatives": Question(
        f"the loss cannot fall below ln 2 = {math.log(2):.3f}, since each query has its own key among the wrong ones; "
        "views that hardly differ and few candidates show it. Neither run comes down to it in so few steps: what tells "
        "is how rarely the own key is picked",
        {
            "mocov2 easy": Variant("mocov2", EASY),
            "mocov2 easy, current keys": Variant("mocov2", EASY, method="mocov2-current-keys"),
        },
        ["picked", "embedding_std"],
    ),
    "DINO without centring, without sharpening": Question(
        "the teacher's entropy falls to 0, or rises to ln K, and the divergence to 0 (arXiv 2104.14294, figure 7). "
        "With settings for so short a run (last layer frozen for 0.1 epochs, 128 outputs, momentum 0.98), chosen after "
        "DINO stayed near uniform outputs while its last layer was frozen; it begins to leave them here, so the three "
        "differ by the signs, not yet by accuracy",
        {
            "dino": Variant("dino", SOON),
            "dino centring=false": Variant("dino", [*SOON, "method.centring=false"]),
            "dino no sharpening": Variant("dino", [*SOON, *NO_SHARPENING]),
        },
        ["teacher_entropy", "divergence", "same_output"],
    ),
    "A batch of 16 in place of 256": Question(
        "costs SimCLR, whose negatives are the batch, more than MoCo or SwAV, which have a queue (arXiv 2006.09882, "
        f"table 2). Each run sees {LONGER:,} images here; the rate goes with the root of the batch, MoCo's momentum "
        "and the steps in which SwAV's prototypes are frozen are those of equally many images",
        {
            f"{name} batch {batch}": with_batch(name, batch)
            for name in ("simclr", "mocov2", "swav")
            for batch in BATCHES
        },
        outcome="not that. A smaller batch, with 16 times as many steps, helps all three: MoCo most, SwAV least. So "
        "short a run tells what steps are worth, not what negatives are",
    ),
    "A loss of 16 images in place of 256": Question(
        "the same, at equal steps: a batch of 256 in micro-batches of 16, which neither the loss nor BatchNorm looks "
        "beyond, so that SimCLR has 30 negatives in place of 510 while queues are as long as before",
        {
            f"{name} batch 256{suffix}": variant
            for name in ("simclr", "mocov2", "swav")
            for suffix, variant in (
                ("", with_batch(name, BATCHES[0])),
                (" in 16 pieces", cut(with_batch(name, BATCHES[0]), 16)),
            )
        },
        outcome="not that either: SimCLR loses nothing by it",
    ),
}


def measure(variant: Variant, folder: Path, shards: Path, seed: int) -> dict[str, Any]:
    """Train with one seed; what its last logged line says, and what the doctor makes of it."""
    steps = variant.seen // variant.batch
    rate = 0.002 * math.sqrt(variant.batch / BATCH)
    overrides = [
        *TINY,
        f"run.dir={folder}",
        f"run.seed={seed}",
        f"run.log_every={steps // LINES}",
        f"data.shards={shards}",
        f"train.global_batch={variant.batch}",
        f"train.steps={steps}",
        f"optim.lr={rate:g}",
        f"evaluate.online_every={0.9 * variant.seen / IMAGES:g}",
        *([f"method.name={variant.method}"] if variant.method else []),
        *variant.overrides,
    ]
    recipe = ROOT / "configs" / "small" / f"{variant.recipe}.yaml"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.ablations", "--pretrain", str(recipe), *overrides]
    subprocess.run(command, cwd=ROOT, check=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = rows[-1]
    words = str(judge(load_config(recipe, overrides), rows) or "")
    environment = json.loads((folder / "environment.json").read_text())
    numbers = {name: value for name, value in last.items() if isinstance(value, float)}
    return {
        "seed": seed,
        "knn": 100 * last["online_knn_top1"],
        "doctor": words,
        **numbers,
        "torch": environment["torch"],
        "processor": environment["processor"],
    }


def page(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown, one table per question."""
    environment = rows[-1]
    lines = [
        "# Ablations\n",
        f"`python -m benchmarks.ablations` on {environment['processor']}, one process per run, torch "
        f"{environment['torch']}. Each run sees {STEPS * BATCH:,} images of 28 px in {STEPS} steps of {BATCH}, unless "
        "it says otherwise: enough to see what collapses, not to rank methods. kNN is on 1,000 held-back training "
        "images with a bank of 2,000, in percent. Numbers are those of the last logged line: means over seeds "
        "(smallest to largest).",
    ]
    for title, question in QUESTIONS.items():
        found = {name: [row for row in rows if row["variant"] == name] for name in question.variants}
        if not any(found.values()):
            continue
        lines += ["", f"## {title}", "", f"What is said to happen: {question.claim}.", ""]
        if question.outcome:
            lines += [f"What came out: {question.outcome}.", ""]
        columns = ["knn", "loss", *question.signs]
        lines += [f"| run | seeds | {' | '.join(columns)} | the doctor |", "|---" * (len(columns) + 3) + "|"]
        for name, own in found.items():
            if own:
                cells = [_cell([row[column] for row in own]) for column in columns]
                lines.append(f"| {name} | {len(own)} | {' | '.join(cells)} | {_words(own)} |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3g} to {max(values):.3g})"


def _words(rows: list[dict[str, Any]]) -> str:
    said = [row["doctor"] for row in rows if row["doctor"]]
    return f"{len(said)} of {len(rows)}: {said[0].split('. Try')[0]}" if said else "-"


def main() -> int:
    """Run the variants and seeds asked for; write the page of these and of what was measured before."""
    if sys.argv[1:2] == ["--pretrain"]:
        METHODS.update(CHANGED)
        return largescale(["pretrain", *sys.argv[2:]])
    METHODS.update(CHANGED)
    variants = {name: variant for question in QUESTIONS.values() for name, variant in question.variants.items()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(variants), default=list(variants), metavar="NAME")
    parser.add_argument("--images", type=Path, default=SHARDS, metavar="SHARDS")
    arguments = parser.parse_args()
    results = RESULTS / "ablations.json"
    for seed in arguments.seeds:
        for name in arguments.variants:
            folder = ROOT / "runs" / "bench-ablations" / f"{name.replace(' ', '-')}-seed{seed}"
            row = {"variant": name, **measure(variants[name], folder, arguments.images, seed)}
            rows = json.loads(results.read_text()) if results.is_file() else []
            rows = [*(old for old in rows if (old["variant"], old["seed"]) != (name, seed)), row]
            results.write_text(json.dumps(rows, indent=1) + "\n")
            (RESULTS / "ablations.md").write_text(page(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
