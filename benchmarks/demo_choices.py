"""What the demo's recipe is chosen by: variants of it, measured on a fifth of the training images that is held out.

    python -m benchmarks.demo_choices [--seeds 0 1 2] [--variants NAME ...] [--ranks 2]

The test images take no part. `make pretrain` unpacks the images that this converts once more. Writes
benchmarks/results/demo_choices.{json,md}; other variants and seeds keep their rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

from benchmarks.accuracies import RESULTS, ROOT, Variant, machine, measure

RECIPE = "configs/small/swav.yaml"
IMAGES, SHARDS = ROOT / "data/fashion-mnist/train", ROOT / "data/shards/fashion-mnist-choices"
COMMON = ["parallel.strategy=fsdp"]


def two_views(epochs: int, prototypes: str, *more: str) -> list[str]:
    """Overrides without the small view."""
    views = "data.crops=[{num: 2, size: 28, scale: [0.8, 1.0]}]"
    return [views, f"train.epochs={epochs}", f"method.prototypes={prototypes}", *more]


VARIANTS = {
    "configs/small/swav.yaml": [],
    "10 epochs": ["train.epochs=10"],
    "10 epochs, 300 prototypes": ["train.epochs=10", "method.prototypes=300"],
    "13 epochs": ["train.epochs=13"],
    "13 epochs, 50 prototypes": ["train.epochs=13", "method.prototypes=50"],
    "two views, 16 epochs": two_views(16, "100"),
    "two views, 16 epochs, no hidden layer": two_views(16, "100", "method.hidden=[]"),
    "two views, 16 epochs, weight decay 0.2": two_views(16, "100", "optim.weight_decay=0.2"),
    "two views, 16 epochs, heads of 30 and 100": two_views(16, "[30,100]"),
    "two views, 16 epochs, 50 prototypes": two_views(16, "50"),
    "two views, 16 epochs, 40 prototypes": two_views(16, "40"),
    "two views, 16 epochs, 30 prototypes": two_views(16, "30"),
    "two views, 20 epochs, 30 prototypes": two_views(20, "30"),
    "two views, 20 epochs, three heads of 30": two_views(20, "[30,30,30]"),
    "two views, 20 epochs, 20 prototypes": two_views(20, "20"),
}
"""Overrides by name."""
ON_TRAINED = """\
## On the images that are trained on

`python -m benchmarks.folds`, by five folds of the 10,000 training images, on which the network was trained; over \
pixels (82.44 kNN, 82.27 linear). Seeds differ by 0.3 there, but longer training is flattered.

| variant of configs/demo.yaml | seed | kNN over pixels | linear over pixels |
|---|---|---|---|
| as it is (16 epochs) | 0 | +2.17 | +4.48 |
| as it is (16 epochs) | 1 | +1.92 | +4.36 |
| queue of 320 from step 400 | 0 | +2.47 | +4.94 |
| 100 prototypes, queue of 640 from step 400 | 0 | -2.74 | +0.84 |
| 24 epochs | 0 | +3.35 | +5.22 |
| 24 epochs, queue of 320 from step 400 | 1 | +2.63 | +5.29 |
| 24 epochs, views from 65% | 0 | +1.83 | +4.31 |
| 24 epochs, views from 90% | 0 | +2.60 | +4.91 |

24 epochs, best here, were asked about the test images with seed 1: 82.80 kNN, 85.60 linear, where 16 have 83.10 and \
85.80. On images held out, as above, 22 epochs have 83.93 and 86.01 with seed 0, where 16 have 83.42 and 87.33. What \
is gained on the images that are trained on is not gained on others, so the recipe stays as it is.
"""
COLUMNS = [f"{protocol} {network}" for protocol in ("knn", "linear") for network in ("pretrained", "pixels")]


def held_out_shards() -> list[str]:
    """Overrides that train on four fifths of the training images and evaluate on the others."""
    if not (SHARDS / "manifest.json").is_file():
        options = ["--labels", "folder", "--shuffle", "0", "--samples-per-shard", "1000", "--holdout", "0.2"]
        subprocess.run([sys.executable, "-m", "shards", "convert", str(IMAGES), str(SHARDS), *options], check=True)
    return [f"data.shards={SHARDS}", f"data.eval_shards={SHARDS / 'holdout'}"]


def page(rows: list[dict[str, Any]]) -> str:
    """Each seed, and the mean of each variant."""
    machines = "; ".join(dict.fromkeys(machine(row) for row in rows))
    lines = [
        "# Variants of the demo on held-out training images\n",
        f"`python -m benchmarks.demo_choices` on {machines}. Top-1 in percent on about 2,000 training images held out "
        "from the other 8,000, which are trained on and are bank and probe. One number's sampling error is about 0.8; "
        "seeds and variants share the images. The seconds include whatever else the machine did.\n",
        "| variant | seed | " + " | ".join(COLUMNS) + " | kNN over pixels | linear over pixels | training s |",
        "|---|---|" + "---|" * (len(COLUMNS) + 3),
    ]
    for name in VARIANTS:
        own = sorted((row for row in rows if row["variant"] == name), key=lambda row: row["seed"])
        mean = {key: statistics.mean(row[key] for row in own) for key in [*COLUMNS, "train_s"]} if len(own) > 1 else {}
        for row in [*own, *([{"seed": "mean", **mean}] if mean else [])]:
            over = [row[f"{protocol} pretrained"] - row[f"{protocol} pixels"] for protocol in ("knn", "linear")]
            cells = [f"{row[key]:.2f}" for key in COLUMNS] + [f"{gain:+.2f}" for gain in over]
            lines.append(f"| {name} | {row['seed']} | {' | '.join(cells)} | {row['train_s']:.0f} |")
    return "\n".join([*lines, "", ON_TRAINED])


def main() -> None:
    """Train and evaluate what is asked for; write the page after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    arguments = parser.parse_args()
    shards, known = held_out_shards(), RESULTS / "demo_choices.json"
    for name in arguments.variants:
        for seed in arguments.seeds:
            folder = ROOT / "runs/bench-demo_choices" / f"{name.replace('/', '-').replace(' ', '-')}-seed{seed}"
            variant = Variant(RECIPE, [*COMMON, *shards, *VARIANTS[name]])
            row = {"variant": name, **measure(variant, folder, seed=seed, ranks=arguments.ranks)}
            rows = json.loads(known.read_text()) if known.is_file() else []
            rows = [*(old for old in rows if (old["variant"], old["seed"]) != (name, seed)), row]
            known.write_text(json.dumps(rows, indent=1) + "\n")
            known.with_suffix(".md").write_text(page(rows))
            print(
                f"{name}, seed {seed}: {row['knn pretrained']:.2f} kNN, {row['linear pretrained']:.2f} linear",
                flush=True,
            )


if __name__ == "__main__":
    main()
