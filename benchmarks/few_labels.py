"""Few labels at the demo's size: PAWS against training from scratch on those labels, and against frozen SwAV features.

    python -m benchmarks.few_labels [--shares 0.1 0.01] [--seeds 0 1 2] [--rows NAME ...]

All rows of a share and seed use the labels of the same images, the split of that seed of `evaluate low-shot`.
Networks are those of configs/small; runs stay in runs/bench-few_labels, so that what is trained is not trained again.
Needs the shards of `make pretrain`. Writes benchmarks/results/few_labels.json and few_labels.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import largescale
from benchmarks.accuracies import RESULTS, ROOT, machine
from largescale.config import load_config
from largescale.data.corpora import Corpus
from largescale.evaluate import low_shot_finetune
from largescale.evaluate.extract import load_method
from largescale.evaluate.image_training import Trial
from shards.format.manifest import read_manifest

RUNS = ROOT / "runs" / "bench-few_labels"
OUT = RESULTS / "few_labels.md"
EPOCHS, BATCH = {0.1: 50, 0.01: 200}, 64
"""Of fine-tuning by the share of labels: as many steps or more with fewer images."""
LONGER = 2
"""Training from scratch gets so many times the epochs, since it starts from nothing."""
SCRATCH_RATES = ([0.1, 0.1], [0.4, 0.4])
"""Of trunk and classifier per 256 images."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """Which labels, and which random numbers a run begins with.

    Attributes:
        share: of the training images whose labels are used.
        seed: of the run and of the split.
    """

    share: float
    seed: int


def pretrained(name: str, folder: str, case: Case, *overrides: str) -> Path:
    """A run of a recipe of configs/small: its folder, complete."""
    place = RUNS / f"{folder}-seed{case.seed}"
    words = [
        f"run.dir={place}",
        f"run.seed={case.seed}",
        "evaluate.online_every=0",
        "parallel.strategy=ddp",
        *overrides,
    ]
    command = [sys.executable, "-m", "largescale", "pretrain", f"configs/small/{name}.yaml", *words]
    subprocess.run(command, cwd=ROOT, check=True)
    return place


def paws(case: Case) -> Path:
    """PAWS, trained with these labels."""
    words = [f"method.support.share={case.share:g}", f"method.support.seed={case.seed}"]
    return pretrained("paws", f"paws-{100 * case.share:g}", case, *words)


def swav(case: Case) -> Path:
    """SwAV, which needs no labels."""
    return pretrained("swav", "swav", case)


def measured(protocol: str, run: Path, *overrides: str) -> dict[str, Any]:
    """What a protocol finds of a run."""
    words = [f"evaluate.{word}" for word in ("baselines=false", *overrides)]
    [record] = largescale.evaluate(protocol, run, overrides=words)
    found: dict[str, Any] = record["results"]["pretrained"]
    return found


def linear(run: Path, case: Case) -> float:
    """Logistic regression on frozen features, on the labels of the case."""
    words = [f"low_shot_shares=[{case.share:g}]", f"low_shot_splits={case.seed + 1}"]
    return float(measured("low-shot", run, *words)["by_share"][f"{case.share:g}"]["splits"][case.seed])


def neighbours(run: Path, case: Case) -> float:
    """Soft nearest neighbours among the labels that the run was trained with."""
    return float(measured("support-neighbours", run, f"support_neighbours_shares=[{case.share:g}]")["top1"])


def fine_tuned(run: Path, case: Case) -> float:
    """The whole network trained on the labels of the case, at the published rates."""
    return float(measured("low-shot-finetune", run, *finetuning(case, EPOCHS[case.share], []))["top1"])


def finetuning(case: Case, epochs: int, rates: list[float]) -> list[str]:
    """Settings of `low-shot-finetune`."""
    values = {"share": case.share, "split": case.seed, "epochs": epochs, "batch": BATCH, "rates": rates}
    return [f"low_shot_finetune_{key}={value}" for key, value in values.items()]


def from_scratch(case: Case) -> float:
    """The same training of a network that is not trained yet, at the rate that is best on the test images."""
    config = load_config(ROOT / "configs/small/paws.yaml", [f"run.seed={case.seed}", f"run.dir={RUNS / 'scratch'}"])
    shards = [Corpus(read_manifest(str(place))) for place in (config.data.shards, config.data.eval_shards)]
    found = []
    for rates in SCRATCH_RATES:
        settings = load_config(
            ROOT / "configs/small/paws.yaml",
            [f"evaluate.{word}" for word in finetuning(case, LONGER * EPOCHS[case.share], rates)],
        ).evaluate
        assert isinstance(settings, low_shot_finetune.Settings)
        trial = Trial(config, load_method(config, None), *shards, config.data.shards, RUNS / "splits", CPU)
        found.append(float(low_shot_finetune.measure(trial, settings)["top1"]))
    return max(found)


ROWS: dict[str, Callable[[Case], float]] = {
    "supervised, from scratch": from_scratch,
    "SwAV, linear on frozen features": lambda case: linear(swav(case), case),
    "SwAV, fine-tuned": lambda case: fine_tuned(swav(case), case),
    "PAWS, nearest neighbours": lambda case: neighbours(paws(case), case),
    "PAWS, linear on frozen features": lambda case: linear(paws(case), case),
    "PAWS, fine-tuned": lambda case: fine_tuned(paws(case), case),
}
"""Top-1, a share, by name of the row; another method is a line."""


def page(found: list[dict[str, Any]]) -> str:
    """The results as Markdown: a table per share, rows against seeds."""
    machines = "; ".join(dict.fromkeys(row["machine"] for row in found))
    lines = [
        "# Few labels",
        "",
        f"`python -m benchmarks.few_labels` on {machines}. Top-1 in percent on 2,000 test images (sampling error about "
        "0.9). All rows of a seed use the labels of the same images; SwAV and PAWS see all 10,000 training images "
        "besides. Networks, views and length of pretraining, 6.5 epochs, are those of configs/small. Fine-tuning is "
        f"`low-shot-finetune` at SwAV's published rates, {EPOCHS[0.1]} epochs with 10% of the labels and "
        f"{EPOCHS[0.01]} with 1%. Training from scratch is the same for {LONGER} times the epochs, at the better of "
        f"{len(SCRATCH_RATES)} rates: better on the test images, which favours it. PAWS's settings were not tuned.",
    ]
    for share in sorted({row["share"] for row in found}, reverse=True):
        own = [row for row in found if row["share"] == share]
        seeds = sorted({row["seed"] for row in own})
        lines += [
            "",
            f"## {100 * share:g}% of the labels",
            "",
            f"| | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |",
            "|---" * (len(seeds) + 2) + "|",
        ]
        for name in [name for name in ROWS if any(row["row"] == name for row in own)]:
            by_seed = {row["seed"]: row["top1"] for row in own if row["row"] == name}
            cells = [f"{by_seed[seed]:.2f}" if seed in by_seed else "-" for seed in seeds]
            lines.append(f"| {name} | {' | '.join(cells)} | **{statistics.mean(by_seed.values()):.2f}** |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the rows asked for; write the page of these and of what was measured before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", choices=list(EPOCHS), default=list(EPOCHS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME")
    arguments = parser.parse_args()
    results = OUT.with_suffix(".json")
    for case in [Case(share, seed) for seed in arguments.seeds for share in arguments.shares]:
        for name in arguments.rows:
            top1 = 100 * ROWS[name](case)
            runs = sorted(RUNS.glob("*/environment.json"))
            row = {"row": name, "share": case.share, "seed": case.seed, "top1": top1}
            row["machine"] = machine({"environment": json.loads(runs[-1].read_text())}) if runs else "-"
            found = json.loads(results.read_text()) if results.is_file() else []
            same = [all(old[key] == row[key] for key in ("row", "share", "seed")) for old in found]
            found = [*(old for old, is_same in zip(found, same, strict=True) if not is_same), row]
            results.write_text(json.dumps(found, indent=1) + "\n")
            OUT.write_text(page(found))
            print(f"{name}, {100 * case.share:g}% of the labels, seed {case.seed}: {top1:.2f}", flush=True)


if __name__ == "__main__":
    main()
