"""SwAV at batches of 64 with 100 to 3,000 prototypes: does a queue in the assignment help, at equally many steps?

    python -m benchmarks.swav_queue --choose [--variants NAME ...] [--jobs 2]    (20,000 other training images, seed 10)
    python -m benchmarks.swav_queue [--variants NAME ...] [--seeds 0 1 2]        (8,000 test images, once)

The recipe is configs/small/swav.yaml with a smaller network whose features are a grid of means, and two views of 20 px,
on one rank, so that a run takes a core a minute. Needs the shards that `make pretrain` makes, and Debian's package
dataset-fashion-mnist. Writes benchmarks/results/queue.{json,md}; other variants and seeds keep their rows.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.accuracies import RESULTS, ROOT, Variant, machine, measure
from benchmarks.fashion import OTHERS, TEST, shards_of

RECIPE = "configs/small/swav.yaml"
COMMON = [
    "data.crops=[{num: 2, size: 20, scale: [0.8, 1.0]}]",
    "model.depths=[1,1,1]",
    "model.width=16",
    "model.pool=2",
    "parallel.strategy=ddp",
    "evaluate.online_every=0",
]
"""A network and views that take a core a minute."""
CHOSEN_WITH = 10
"""Seed of the runs that settings are chosen by."""


def _variants(prototypes: int, epsilon: float, *queues: tuple[int, int]) -> dict[str, list[str]]:
    """Overrides by name, without a queue and with each: of a size, from a step on."""
    common = [f"method.prototypes={prototypes}", f"method.epsilon={epsilon}"]
    found = {f"{prototypes:,} prototypes, epsilon {epsilon}: none": common}
    for size, start in queues:
        name = f"{prototypes:,} prototypes, epsilon {epsilon}: {size:,} from step {start}"
        found[name] = [*common, f"method.queue={size}", f"method.queue_start_step={start}"]
    return found


VARIANTS = {
    **_variants(100, 0.05, (640, 800), (256, 600)),
    **_variants(100, 0.03, (640, 800)),
    **_variants(500, 0.03, (640, 700), (640, 400)),
    **_variants(500, 0.02, (640, 700)),
    **_variants(1000, 0.03, (960, 700), (960, 600), (1920, 700)),
    **_variants(1000, 0.02, (960, 700)),
    **_variants(3000, 0.03, (1920, 600), (3840, 600), (1920, 500)),
    **_variants(3000, 0.02, (1920, 600)),
    **_variants(3000, 0.05),
}
"""Overrides by name."""
COLUMNS = [f"{protocol} {network}" for protocol in ("knn", "linear") for network in ("pretrained", "pixels")]


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
        "# A queue for SwAV at batches of 64\n",
        f"`python -m benchmarks.swav_queue` on {machines}. The recipe is configs/small/swav.yaml, but two views of "
        "20 px, a ResNet of three blocks from 16 channels on with features of a 2 x 2 grid, and one rank. With and "
        "without a queue in the assignment; equally many steps (1,014), the first ones the same with one seed. Top-1 "
        "in percent. The last columns are the smallest values after the first third of a run: the share of prototypes "
        "that are nearest to an image, and the entropy of a batch's mean code, of what it can reach.",
    ]
    for chosen_by in (False, True):
        own = [row for row in rows if row["chosen_by"] == chosen_by]
        if own:
            lines += [
                "",
                f"## {HEADINGS[chosen_by]}",
                "",
                *_table(own),
                *([] if chosen_by else ["", *_differences(own)]),
            ]
    return "\n".join(lines) + "\n"


HEADINGS = {
    True: f"Chosen by: 20,000 training images that nothing is trained on, seed {CHOSEN_WITH}",
    False: "Reported: 8,000 test images that nothing was chosen by",
}


def _differences(rows: list[dict[str, Any]]) -> list[str]:
    """What a queue is worth: differences from the same seed without one, their mean, and its standard error."""
    lines = [
        "What the queue is worth, seed by seed:",
        "",
        "| queue | kNN | mean | linear | mean |",
        "|---|---|---|---|---|",
    ]
    for name in VARIANTS:
        without = {row["seed"]: row for row in rows if row["variant"] == f"{name.partition(': ')[0]}: none"}
        own = [row for row in rows if row["variant"] == name and row["seed"] in without]
        if name in {row["variant"] for row in without.values()} or len(own) < 2:
            continue
        cells = []
        for protocol in ("knn", "linear"):
            key = f"{protocol} pretrained"
            found = [row[key] - without[row["seed"]][key] for row in sorted(own, key=lambda row: row["seed"])]
            error = statistics.stdev(found) / len(found) ** 0.5
            cells += [", ".join(f"{one:+.2f}" for one in found), f"{statistics.mean(found):+.2f} ± {error:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


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
    parser.add_argument("--choose", action="store_true", help=f"20,000 other training images, seed {CHOSEN_WITH}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    arguments = parser.parse_args()
    shards = f"data.eval_shards={shards_of(OTHERS if arguments.choose else TEST)}"
    seeds, known, writing = (
        [CHOSEN_WITH] if arguments.choose else arguments.seeds,
        RESULTS / "queue.json",
        threading.Lock(),
    )

    def one(name: str, seed: int) -> None:
        folder = ROOT / "runs/bench-swav_queue" / f"{re.sub('[ ,:]+', '-', name)}-seed{seed}"
        variant = Variant(RECIPE, [*COMMON, shards, *VARIANTS[name]])
        row = {"variant": name, "chosen_by": arguments.choose}
        row |= measure(variant, folder, seed=seed, ranks=1, jobs=arguments.jobs) | signs(folder)
        with writing:
            rows = json.loads(known.read_text()) if known.is_file() else []
            same = (name, seed, arguments.choose)
            rows = [*(old for old in rows if (old["variant"], old["seed"], old["chosen_by"]) != same), row]
            known.write_text(json.dumps(rows, indent=1) + "\n")
            known.with_suffix(".md").write_text(page(rows))
        print(
            f"{name}, seed {seed}: {row['knn pretrained']:.2f} kNN, {row['linear pretrained']:.2f} linear", flush=True
        )

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(one, *zip(*product(arguments.variants, seeds), strict=True)))


if __name__ == "__main__":
    main()
