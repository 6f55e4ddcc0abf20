"""SwAV on clip art with two views, and with small ones besides: which is better after equal training time?

    OMP_NUM_THREADS=1 python -m benchmarks.multicrop [FOLDER] [--seeds 0 1 2]

FOLDER has pictures in a folder for each class: `apt install openclipart-png` puts some into the default. A quarter of
the pictures is held out to evaluate on. All recipes are trained for as much CPU time, on one thread. Writes
benchmarks/results/multicrop.{json,md}; rows of other seeds are kept.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracies import RESULTS, ROOT, machine
from largescale.run.environment import environment

PICTURES = Path("/usr/share/openclipart/png")
SHARDS, RUNS = ROOT / "data/shards/clip-art-128", ROOT / "runs/bench-multicrop"
RECIPE = "configs/swav/own_images_cpu.yaml"
TWO = "2 x 64"
CROPS = {
    TWO: "data.crops=[{num: 2, size: 64, scale: [0.14, 1.0]}]",
    "2 x 48 + 4 x 32": "data.crops=[{num: 2, size: 48, scale: [0.14, 1.0]}, {num: 4, size: 32, scale: [0.05, 0.14]}]",
    "2 x 48": "data.crops=[{num: 2, size: 48, scale: [0.14, 1.0]}]",
}
EPOCHS = {TWO: 16.0, "2 x 48": 27.0, "2 x 48 + 4 x 32": 15.0}
"""Of equal CPU time: 165, 170 and 169 s where they were chosen. Each row says what its training took."""

CHOSEN = """\
Chosen before, on the pictures that are trained on alone (five folds of them; kNN and a logistic regression, seed 5, \
each trained for about 170 s of CPU time):

| views | scale | epochs | kNN | linear |
|---|---|---|---|---|
| 2 x 64 | 14% to 100% | 16 | 61.5 | 60.4 |
| 2 x 64 | 25% to 100% | 16 | 60.6 | 60.7 |
| 2 x 48 | 14% to 100% | 27 | 62.7 | 61.2 |
| 2 x 64 + 2 x 32 | 14% to 100%, 5% to 14% | 12.8 | 62.1 | 61.5 |
| 2 x 48 + 4 x 32 | 14% to 100%, 5% to 14% | 15 | 62.9 | 61.5 |

Before, with the colour changes of photographs, 25% to 100%, and 8% to 25%, 2 x 64 + 4 x 32 for 6.5 epochs and 2 x 64 \
for 8 were level (kNN 60.8 and 60.4, linear 58.0 and 58.1, three seeds).
"""
WARMUP = 0.1
"""Share of the epochs."""
COMMON = [
    "model.width=16",
    "method.freeze_prototypes_steps=20",
    "data.workers=0",
    "checkpoint.every_steps=0",
    "evaluate.online_every=0",
    # As `largescale init` proposes for drawings.
    "data.augment.brightness=0.1",
    "data.augment.contrast=0.1",
    "data.augment.saturation=0",
    "data.augment.hue=0",
]
PROTOCOLS = {
    "knn": [],
    "linear-cached": ["evaluate.linear_cached_strengths=[0.01,0.001]", "evaluate.linear_cached_steps=60"],
}
"""And their settings, with which a probe on raw pixels takes a minute."""
COLUMNS = [f"{protocol} {network}" for protocol in PROTOCOLS for network in ("pretrained", "untrained", "pixels")]


def shards(pictures: Path) -> list[str]:
    """Overrides; the shards are made if they are not there."""
    if not (SHARDS / "manifest.json").is_file():
        options = [
            "--labels",
            "folder",
            "--duplicates",
            "exact",
            "--max-side",
            "128",
            "--holdout",
            "0.25",
            "--shuffle",
            "0",
        ]
        subprocess.run([sys.executable, "-m", "shards", "convert", str(pictures), str(SHARDS), *options], check=True)
    return [f"data.shards={SHARDS}", f"data.eval_shards={SHARDS / 'holdout'}"]


def train(folder: Path, *overrides: str) -> None:
    """Train into a folder, unless the run there is complete."""
    _largescale("pretrain", RECIPE, f"run.dir={folder}", *COMMON, *overrides)


def measure(name: str, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Train and evaluate: accuracies in percent, and the CPU time of the training."""
    epochs = EPOCHS[name]
    folder = RUNS / f"{name.replace(' ', '')}-seed{seed}"
    length = [f"train.epochs={epochs}", f"optim.warmup_epochs={epochs * WARMUP:.3g}"]
    shutil.rmtree(folder, ignore_errors=True)  # a complete run would not train again, and take no time
    before = _cpu_s()
    train(folder, CROPS[name], f"run.seed={seed}", *length, *overrides)
    row: dict[str, Any] = {"crops": name, "seed": seed, "epochs": epochs, "cpu_s": _cpu_s() - before}
    for protocol, settings in PROTOCOLS.items():
        baselines = f"evaluate.baselines={name == TWO}"  # which are the same for all
        _largescale("evaluate", protocol, str(folder), baselines, *settings)
        results = json.loads((folder / "eval" / f"{protocol}.json").read_text())["results"]
        row |= {f"{protocol} {network}": 100 * result["top1"] for network, result in results.items()}
    return row | {"machine": machine({"environment": environment(), "ranks": 1})}


def page(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = found["rows"]
    lines = [
        "# SwAV's small views at equal training time\n",
        f"`OMP_NUM_THREADS=1 python -m benchmarks.multicrop` on {rows[-1]['machine']}. Debian's openclipart-png "
        f"without exact copies: {found['images'][0]:,} pictures trained on, {found['images'][1]:,} held out, 22 "
        "folders as classes; `configs/swav/own_images_cpu.yaml` with half the width and the colour changes "
        "that `largescale init` proposes for drawings. Top-1 in percent of frozen features; "
        "one number's sampling error is about 1.2, the pictures are the same for all.\n",
        "| views | seed | epochs | " + " | ".join(COLUMNS) + " | CPU s of training |",
        "|---|---|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    keys = ["epochs", *COLUMNS, "cpu_s"]
    for name in CROPS:
        own = [row for row in rows if row["crops"] == name]
        common = [key for key in keys if all(key in row for row in own)]
        mean = [{"seed": "mean", **{key: statistics.mean(row[key] for row in own) for key in common}}] if own else []
        for row in [*own, *mean]:
            cells = [f"{row['epochs']:.0f}", *(f"{row[key]:.2f}" if key in row else "-" for key in COLUMNS)]
            lines.append(f"| {name} | {row['seed']} | {' | '.join(cells)} | {row['cpu_s']:.0f} |")
    return "\n".join([*lines, "", CHOSEN])


def _largescale(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "largescale", *words], cwd=ROOT, check=True)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _images(folder: Path) -> int:
    return json.loads((folder / "manifest.json").read_text())["num_samples"]


def main() -> None:
    """Train and evaluate; write the page after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", metavar="FOLDER", type=Path, nargs="?", default=PICTURES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    overrides, known = shards(arguments.pictures), RESULTS / "multicrop.json"
    found = json.loads(known.read_text()) if known.is_file() else {"rows": []}
    found |= {"images": [_images(SHARDS), _images(SHARDS / "holdout")]}
    for seed in arguments.seeds:
        for name in CROPS:
            others = [row for row in found["rows"] if (row["crops"], row["seed"]) != (name, seed)]
            found["rows"] = [*others, measure(name, seed, overrides)]
            known.write_text(json.dumps(found, indent=1) + "\n")
            known.with_suffix(".md").write_text(page(found))


if __name__ == "__main__":
    main()
