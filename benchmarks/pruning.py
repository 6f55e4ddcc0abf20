"""Pruning curves at the demo's size: a linear probe against the share of weights left, with drawn masks as control.

    python -m benchmarks.pruning [--seeds 0] [--methods rotation swav] [--controls masks] [--steps 104] [--rounds 7]

Every network is trained, by a method or with labels, then pruned and trained again round by round (`largescale prune`),
from one eighth of the steps on. What is complete is not done again, so the same command goes on after a stop, and more
seeds, methods or controls can be added. Needs the shards of `make pretrain`. Writes benchmarks/results/pruning.json,
pruning.md and pruning.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracies import RESULTS, ROOT
from largescale.config import flatten, load_config
from largescale.models.backbones import build_backbone
from largescale.models.image_classifier import ImageClassifier, built, write_classifier
from largescale.prune.curve import Point, figure_of, read_curve
from largescale.report import plots
from largescale.run.environment import environment
from shards.format.manifest import read_manifest

METHODS = {
    "rotation": "configs/small/rotation.yaml",
    "swav": "configs/small/swav.yaml",
    "supervised": "configs/small/distillation.yaml",
}
LABELS = [
    "method.label_weight=1",
    "method.support={classes: 10, images: 6}",
    "train.global_batch=16",
    "optim.warmup_epochs=0.02",
]
"""Training with labels: each step's loss is that of 60 labelled images of all classes. The student's other images, and
its teacher, which is untrained, have no weight; as few as may be are read.
"""
CONTROLS = ("masks", "weights")
_REWIND_PART = 8
_BY_HAND = "<!-- read -->\n"
_WAYS = {"": "pruned by magnitude", "masks": "masks drawn at random", "weights": "weights drawn again"}


def measure(method: str, seed: int, arguments: argparse.Namespace) -> None:
    """Train, prune and probe with one seed; writes the page after each way."""
    run = folder_of(method, seed, arguments)
    rewind = arguments.steps // _REWIND_PART
    shared = ["parallel.strategy=ddp", "evaluate.baselines=false", "evaluate.online_every=0"]
    kept = [f"checkpoint.every_steps={rewind}", f"checkpoint.keep_every={rewind}"]
    length = [f"train.steps={arguments.steps}", f"run.log_every={rewind}", "optim.warmup_epochs=0.08"]
    by_labels = method == "supervised"
    start = ["distill", str(untrained())] if by_labels else ["pretrain"]
    own = LABELS if by_labels else []
    command(*start, METHODS[method], f"run.dir={run}", f"run.seed={seed}", *shared, *kept, *length, *own)
    for control in ("", *arguments.controls):
        how = ["--random", control] if control else []
        back = [] if control == "weights" else ["--rewind", str(rewind)]
        extent = ["--rate", str(arguments.rate), "--rounds", str(arguments.rounds), "--evaluate", "linear"]
        lean = ["checkpoint.keep_every=0", "checkpoint.keep=1", f"checkpoint.every_steps={rewind * 4}"]
        command("prune", str(run), *extent, *how, *back, "evaluate.baselines=false", *lean)
        record(method, seed, control, run, arguments)


def untrained() -> Path:
    """The file of a classifier that says nothing, in the place of a teacher."""
    path = ROOT / "runs" / "bench-pruning" / "untrained.safetensors"
    if not path.is_file():
        config = load_config(ROOT / METHODS["supervised"])
        classes = list(read_manifest(str(config.data.shards)).classes)
        torch.manual_seed(0)
        backbone, width = build_backbone(config.model)
        network = ImageClassifier(backbone, built([f"linear {width} {len(classes)} bias"]))
        values = {key: value for key, value in flatten(config).items() if key.startswith("model.")}
        about = {"config": values, "classes": classes, "mean": config.data.mean, "std": config.data.std}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_classifier(path, network, {key: json.dumps(value) for key, value in about.items()})
    return path


def folder_of(method: str, seed: int, arguments: argparse.Namespace) -> Path:
    """The run that is pruned; its rounds are in it."""
    return ROOT / "runs" / "bench-pruning" / f"{method}-{arguments.steps}steps-seed{seed}"


def command(*words: str) -> None:
    """Run one command of the package."""
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run([sys.executable, "-m", "largescale", *words], cwd=ROOT, check=True, env={**os.environ, **threads})


def record(method: str, seed: int, control: str, run: Path, arguments: argparse.Namespace) -> None:
    """Put a curve into the results, in the place of an older one, and write the page again."""
    path = RESULTS / "pruning.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    row = {"method": method, "seed": seed, "control": control, "steps": arguments.steps, "rate": arguments.rate}
    rows = [old for old in rows if any(old[key] != row[key] for key in row)]
    points = read_curve(run / (f"pruning-random-{control}" if control else "pruning"))
    about = environment()
    del about["command"]
    rows.append({**row, "points": [vars(point) for point in points], "environment": about})
    path.write_text(json.dumps(rows, indent=1) + "\n")
    write(rows, arguments)


def write(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Write the table and the plot of the curves of one length: means over seeds."""
    rows = [row for row in rows if row["steps"] == arguments.steps and row["rate"] == arguments.rate]
    curves = {f"{method}, {_WAYS[way]}": mean_of(rows, method, way) for method in METHODS for way in _WAYS}
    curves = {label: points for label, points in curves.items() if points}
    seeds = ", ".join(
        f"{method} {sorted({row['seed'] for row in rows if row['method'] == method})}"
        for method in METHODS
        if any(row["method"] == method for row in rows)
    )
    about = rows[-1]["environment"]
    (RESULTS / "pruning.md").write_text(
        f"# Pruning\n\n`python -m benchmarks.pruning` on {about['processor']}, {about['cpu_cores']} cores, one rank, "
        f"torch {about['torch']}. Top-1 in percent of a linear probe of frozen features, on 2,000 test images that no "
        f"choice was made on; the probe is trained on the 10,000 training images. One number's sampling error is about "
        f"0.8. Each network is trained for {arguments.steps} steps of 64 images (with labels: 60), from step "
        f"{arguments.steps // _REWIND_PART} of the first one on; each round prunes {arguments.rate:.0%} of the weights "
        f"of convolutions that are left. Seeds: {seeds}; the table has their means.\n\n"
        f"![Pruning curves](pruning.svg)\n\n{table(curves, lambda point: point.accuracies['linear'], '.1f')}\n\n"
        f"The method's own loss, over the last {arguments.steps // _REWIND_PART} steps of each training:\n\n"
        f"{table(curves, lambda point: point.loss or float('nan'), '.3f')}\n{reading()}"
    )
    for path in plots.save(figure_of("linear", curves), RESULTS, "pruning"):
        if path.suffix == ".png":
            path.unlink()


def reading() -> str:
    """What was written below the tables by hand, after `<!-- read -->`; kept as it is."""
    path = RESULTS / "pruning.md"
    _, mark, text = path.read_text().partition(_BY_HAND) if path.is_file() else ("", "", "")
    return f"\n{mark}{text}" if mark else ""


def table(curves: dict[str, list[Point]], value: Callable[[Point], float], form: str) -> str:
    """A number of each round as Markdown."""
    lines = ["| weights left | " + " | ".join(curves) + " |", "|---|" + "---|" * len(curves)]
    for share in sorted({round(point.share, 3) for points in curves.values() for point in points}, reverse=True):
        found = [[value(point) for point in points if round(point.share, 3) == share] for points in curves.values()]
        cells = [format(values[0], form) if values else "-" for values in found]
        lines.append(f"| {share:.3g}% | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_of(rows: list[dict[str, Any]], method: str, way: str) -> list[Point]:
    """The mean curve over seeds, of the rounds that all of them have."""
    curves = [
        [Point(**point) for point in row["points"]] for row in rows if (row["method"], row["control"]) == (method, way)
    ]
    return [
        Point(first.round, first.left, first.weights, first.state, _loss(same), {"linear": _mean(same)})
        for same in zip(*curves, strict=False)
        for first in same[:1]
        if all("linear" in point.accuracies for point in same)
    ]


def _loss(points: tuple[Point, ...]) -> float | None:
    losses = [point.loss for point in points if point.loss is not None]
    return statistics.mean(losses) if losses else None


def _mean(points: tuple[Point, ...]) -> float:
    return statistics.mean(point.accuracies["linear"] for point in points)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--controls", nargs="*", choices=CONTROLS, default=["masks"])
    parser.add_argument("--steps", type=int, default=104, help="of each training")
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for method in arguments.methods:
            measure(method, seed, arguments)


if __name__ == "__main__":
    main()
