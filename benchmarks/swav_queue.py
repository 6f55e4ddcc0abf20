"""SwAV at batches of 64 with 500 prototypes: does a queue in the assignment help, at equally many steps?

    python -m benchmarks.swav_queue --choose [--variants NAME ...] [--jobs 2]    (held-out training images, seed 10)
    python -m benchmarks.swav_queue [--variants NAME ...] [--seeds 0 1 2]        (test images, once)

The recipe is configs/small/swav.yaml with a smaller network and two views of 20 px, on one rank, so that a run takes a
core a minute. `make pretrain` makes the shards. Writes benchmarks/results/queue.{json,md}; other variants and seeds
keep their rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.accuracies import RESULTS, ROOT, Variant, machine, measure

RECIPE = "configs/small/swav.yaml"
IMAGES, SHARDS = ROOT / "data/fashion-mnist/train", ROOT / "data/shards/fashion-mnist-choices"
PROTOTYPES = 500
COMMON = [
    "data.crops=[{num: 2, size: 20, scale: [0.8, 1.0]}]",
    "model.depths=[1,1,1]",
    "model.width=16",
    f"method.prototypes={PROTOTYPES}",
    "parallel.strategy=ddp",
    "evaluate.online_every=0",
]
"""A network and views that take a core a minute."""
CHOSEN_WITH = 10
"""Seed of the runs that settings are chosen by."""


def queued(size: int, start: int, epsilon: float) -> list[str]:
    """Overrides."""
    queue = [f"method.queue={size}", f"method.queue_start_step={start}"] if size else []
    return [f"method.epsilon={epsilon}", *queue]


VARIANTS = {
    "no queue, epsilon 0.03": queued(0, 0, 0.03),
    "no queue, epsilon 0.05": queued(0, 0, 0.05),
    "1,920 from step 300, epsilon 0.03": queued(1920, 300, 0.03),
    "64 from step 500, epsilon 0.05": queued(64, 500, 0.05),
    "320 from step 500, epsilon 0.05": queued(320, 500, 0.05),
    "640 from step 600, epsilon 0.05": queued(640, 600, 0.05),
}
COLUMNS = [f"{protocol} {network}" for protocol in ("knn", "linear") for network in ("pretrained", "pixels")]


def held_out_shards() -> list[str]:
    """Overrides that train on four fifths of the training images and evaluate on the others."""
    if not (SHARDS / "manifest.json").is_file():
        options = ["--labels", "folder", "--shuffle", "0", "--samples-per-shard", "1000", "--holdout", "0.2"]
        subprocess.run([sys.executable, "-m", "shards", "convert", str(IMAGES), str(SHARDS), *options], check=True)
    return [f"data.shards={SHARDS}", f"data.eval_shards={SHARDS / 'holdout'}"]


SIGNS = ("prototype_usage", "code_balance")
"""Of which the smallest value in the lines after the first third is kept."""


def signs(folder: Path) -> dict[str, float]:
    """What a run says of its prototypes."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {sign: min(line[sign] for line in lines if line["progress"] > 1 / 3) for sign in SIGNS}


def page(rows: Sequence[dict[str, Any]]) -> str:
    """Both tables."""
    machines = "; ".join(dict.fromkeys(machine(row) for row in rows))
    lines = [
        f"# A queue for SwAV at batches of 64 with {PROTOTYPES} prototypes\n",
        f"`python -m benchmarks.swav_queue` on {machines}. The recipe is configs/small/swav.yaml, but two views of "
        f"20 px, a ResNet of three blocks from 16 channels on, one rank and {PROTOTYPES} prototypes: a network below "
        "raw pixels, which tells a better assignment from a worse one all the same. With and without a queue in the "
        "assignment; equally many steps. Top-1 in percent; one number's sampling error is about 0.9. The last columns "
        "are the smallest values after the first third of a run: the share of prototypes that are nearest to an image, "
        "and the entropy of a batch's mean code, of what it can reach.",
    ]
    for held_out in (True, False):
        own = [row for row in rows if row["held_out"] == held_out]
        if own:
            lines += ["", f"## {HEADINGS[held_out]}", "", *_table(own)]
    return "\n".join(lines) + "\n"


HEADINGS = {
    True: f"Chosen by: about 2,000 training images held out from the other 8,000, seed {CHOSEN_WITH}",
    False: "Reported: 2,000 test images, after 10,000 training images",
}


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Each seed, and the mean of each variant."""
    lines = ["| queue | seed | " + " | ".join([*COLUMNS, *SIGNS]) + " |", "|---|---|" + "---|" * (len(COLUMNS) + 2)]
    for name in VARIANTS:
        own = sorted((row for row in rows if row["variant"] == name), key=lambda row: row["seed"])
        keys = [*COLUMNS, *SIGNS]
        mean = {key: statistics.mean(row[key] for row in own) for key in keys} if len(own) > 1 else {}
        for row in [*own, *([{"seed": "mean", **mean}] if mean else [])]:
            cells = [f"{row[key]:.2f}" for key in keys]
            lines.append(f"| {name} | {row['seed']} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Train and evaluate what is asked for; write the page after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", action="store_true", help=f"held-out training images, seed {CHOSEN_WITH}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    arguments = parser.parse_args()
    shards = held_out_shards() if arguments.choose else []
    seeds, known, writing = (
        [CHOSEN_WITH] if arguments.choose else arguments.seeds,
        RESULTS / "queue.json",
        threading.Lock(),
    )

    def one(name: str, seed: int) -> None:
        folder = ROOT / "runs/bench-swav_queue" / f"{name.replace(' ', '-').replace(',', '')}-seed{seed}"
        variant = Variant(RECIPE, [*COMMON, *shards, *VARIANTS[name]])
        row = {"variant": name, "held_out": arguments.choose}
        row |= measure(variant, folder, seed=seed, ranks=1, jobs=arguments.jobs) | signs(folder)
        with writing:
            rows = json.loads(known.read_text()) if known.is_file() else []
            same = (name, seed, arguments.choose)
            rows = [*(old for old in rows if (old["variant"], old["seed"], old["held_out"]) != same), row]
            known.write_text(json.dumps(rows, indent=1) + "\n")
            known.with_suffix(".md").write_text(page(rows))
        print(
            f"{name}, seed {seed}: {row['knn pretrained']:.2f} kNN, {row['linear pretrained']:.2f} linear", flush=True
        )

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(one, *zip(*product(arguments.variants, seeds), strict=True)))


if __name__ == "__main__":
    main()
