"""What the demo's recipe is chosen by: variants of it, measured on training images that nothing is trained on.

    python -m benchmarks.demo_choices [--seeds 0 1 2] [--variants NAME ...] [--ranks 2]

Trained on the demo's 10,000 images, measured on 20,000 others (Debian's package dataset-fashion-mnist); the test images
take no part. `make pretrain` makes the shards of the former. Writes benchmarks/results/demo_choices.{json,md}; other
variants and seeds keep their rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.accuracies import RESULTS, ROOT, Variant, machine, measure
from benchmarks.fashion import OTHERS, shards_of

RECIPE = "configs/demo.yaml"

VARIANTS = {RECIPE: [], "features of one mean": ["model.pool=1"]}
"""Overrides by name."""
OF_ONE_MEAN = (
    "the recipe then",
    "width 48",
    "bottlenecks, three stages",
    "width 16, stem of stride 1",
    "rate 0.004",
    "wider head",
    "erasing half as often",
    "erasing always, larger parts",
    "wider head, erasing half as often",
    "wider head, erasing half as often, twice the noise",
    "wider head, no erasing",
)
"""Variants of the recipe when it had four stages, width 32 and features of one mean."""
BEFORE = (
    "configs/small/swav.yaml",
    "10 epochs",
    "10 epochs, 300 prototypes",
    "13 epochs",
    "13 epochs, 50 prototypes",
    "two views, 16 epochs",
    "two views, 16 epochs, no hidden layer",
    "two views, 16 epochs, weight decay 0.2",
    "two views, 16 epochs, heads of 30 and 100",
    "two views, 16 epochs, 50 prototypes",
    "two views, 16 epochs, 40 prototypes",
    "two views, 16 epochs, 30 prototypes",
    "two views, 20 epochs, 30 prototypes",
    "two views, 20 epochs, three heads of 30",
    "two views, 20 epochs, 20 prototypes",
)
"""Variants of configs/small/swav.yaml that the recipe was chosen among, before there were other images to ask."""
ON_TRAINED = """\
## On the images that are trained on

`python -m benchmarks.folds`, by five folds of the 10,000 training images, on which the network was trained; over \
pixels (82.44 kNN, 82.27 linear). Seeds differ by 0.3 there, but longer training is flattered.

| variant of the recipe of one mean | seed | kNN over pixels | linear over pixels |
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
FOUND = """\
All images are framed alike, and a mean over the whole map forgets where things are, which raw pixels do not. With a \
grid of 2 x 2 (768 numbers per image; pixels are 784) both goals, +3 and +4.5, are met here. Most of it is the grid: \
laid over the maps of the network that was trained for one mean, with seed 0, it gives 86.42 kNN and 88.70 by a \
logistic regression, by which the recipe has 86.77 and 89.03, and four stages of width 32 with a grid 86.46 and 88.06.

## Before: features of one mean

Variants of four stages, width 32 and `model.pool=1`, on the same images.

"""
THEN = """\
Seeds of the recipe itself are up to 0.6 points of the probe apart, so none of these, with one seed each, is shown to \
be better in both. Without erasing all of the lead in kNN is gone; more of it than the recipe has is no better either. \
Evaluating at 32 px in place of 28 costs 1.4 points of kNN and 0.3 of the probe (seeds 0 and 1).
"""
COLUMNS = [f"{protocol} {network}" for protocol in ("knn", "linear") for network in ("pretrained", "pixels")]


def page(rows: list[dict[str, Any]]) -> str:
    """All tables."""
    machines = "; ".join(dict.fromkeys(machine(row) for row in rows))
    lines = [
        "# Variants of the demo on training images that nothing is trained on\n",
        f"`python -m benchmarks.demo_choices` on {machines}. Trained on the demo's 10,000 images, which are bank and "
        "probe too; top-1 in percent on 20,000 other training images of Fashion-MNIST. One number's sampling error is "
        "about 0.25. The seconds include whatever else the machine did.\n",
        *_table(rows, list(VARIANTS)),
        "",
        FOUND,
        *_table(rows, OF_ONE_MEAN),
        "",
        THEN,
        "## Before: a fifth of the training images held out\n",
        "Top-1 in percent on about 2,000 training images held out from the other 8,000, which are trained on and are "
        "bank and probe. One number's sampling error is about 0.8; seeds and variants share the images.\n",
        *_table(rows, BEFORE),
        "",
        ON_TRAINED,
    ]
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Each seed, and the mean of each variant."""
    lines = [
        "| variant | seed | " + " | ".join(COLUMNS) + " | kNN over pixels | linear over pixels | training s |",
        "|---|---|" + "---|" * (len(COLUMNS) + 3),
    ]
    for name in names:
        own = sorted((row for row in rows if row["variant"] == name), key=lambda row: row["seed"])
        mean = {key: statistics.mean(row[key] for row in own) for key in [*COLUMNS, "train_s"]} if len(own) > 1 else {}
        for row in [*own, *([{"seed": "mean", **mean}] if mean else [])]:
            over = [row[f"{protocol} pretrained"] - row[f"{protocol} pixels"] for protocol in ("knn", "linear")]
            cells = [f"{row[key]:.2f}" for key in COLUMNS] + [f"{gain:+.2f}" for gain in over]
            lines.append(f"| {name} | {row['seed']} | {' | '.join(cells)} | {row['train_s']:.0f} |")
    return lines


def main() -> None:
    """Train and evaluate what is asked for; write the page after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    arguments = parser.parse_args()
    others, known = f"data.eval_shards={shards_of(OTHERS)}", RESULTS / "demo_choices.json"
    for name in arguments.variants:
        for seed in arguments.seeds:
            folder = ROOT / "runs/bench-demo_choices" / f"{name.replace('/', '-').replace(' ', '-')}-seed{seed}"
            row = {
                "variant": name,
                **measure(
                    Variant(RECIPE, [others, "evaluate.online_every=0", *VARIANTS[name]]),
                    folder,
                    seed=seed,
                    ranks=arguments.ranks,
                ),
            }
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
