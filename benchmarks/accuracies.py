"""Accuracies of recipes over seeds, the way of `make pretrain`: torchrun, `largescale evaluate`, a table."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largescale.config import load_config
from largescale.parallel.batchnorm import STATISTICS
from largescale.plan.simulate import simulate
from largescale.plan.trace import WEIGHTS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

COLUMNS = [
    f"{protocol} {network}" for protocol in ("knn", "linear") for network in ("pretrained", "untrained", "pixels")
]


@dataclass(frozen=True)
class Variant:
    """A recipe, and what is set differently in it."""

    recipe: str
    overrides: Sequence[str] = ()


def measure(variant: Variant, folder: Path, *, seed: int, ranks: int) -> dict[str, Any]:
    """Train and evaluate with one seed: accuracies in percent, the training time, the environment."""
    threads = max(1, (os.cpu_count() or 1) // ranks)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launch, "-m", "largescale", "pretrain", variant.recipe, f"run.dir={folder}", f"run.seed={seed}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([*command, *variant.overrides], cwd=ROOT, check=True, env=environment)
    row: dict[str, Any] = {"seed": seed}
    for protocol in ("knn", "linear"):
        subprocess.run([sys.executable, "-m", "largescale", "evaluate", protocol, folder], cwd=ROOT, check=True)
        results = json.loads((folder / "eval" / f"{protocol}.json").read_text())["results"]
        row |= {f"{protocol} {network}": 100 * result["top1"] for network, result in results.items()}
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [-1, *(line["step"] for line in metrics)]
    row["train_s"] = sum(line["step_s"] * (line["step"] - before) for line, before in zip(metrics, steps, strict=False))
    row["images_per_s"] = metrics[-1]["images_seen"] / row["train_s"]
    row["memory_gb"] = max(line["peak_memory_bytes"] for line in metrics) / 1e9
    row["collectives"], row["own_collectives"] = collectives(folder, ranks)
    row["environment"] = json.loads((folder / "environment.json").read_text())
    del row["environment"]["command"]
    return row


def collectives(folder: Path, ranks: int) -> tuple[int, int]:
    """Per step of a run: all, and those that are neither BatchNorm's nor of weights and gradients."""
    counts = simulate(load_config(folder / "config.yaml"), ranks).counts
    own = sum(number for what, number in counts.items() if what.of not in (WEIGHTS, STATISTICS))
    return counts.total(), own


def table(rows: list[dict[str, Any]], names: Sequence[str], *, of: str) -> str:
    """The results as Markdown: each seed, and the mean of each variant."""
    lines = [
        f"| {of} | seed | " + " | ".join(COLUMNS) + " | training s | images/s | GB per rank | collectives |",
        "|---|---|" + "---|" * (len(COLUMNS) + 4),
    ]
    for name in names:
        own = sorted((row for row in rows if row["variant"] == name), key=lambda row: row["seed"])
        for row in own:
            cells = [f"{row[column]:.2f}" for column in COLUMNS]
            cells += [f"{row['train_s']:.0f}", f"{row['images_per_s']:.0f}", *_costs(row)]
            lines.append(f"| {name} | {row['seed']} | {' | '.join(cells)} |")
        if own:
            cells = [f"**{statistics.mean(row[column] for row in own):.2f}**" for column in COLUMNS]
            seconds, rate = (statistics.mean(row[key] for row in own) for key in ("train_s", "images_per_s"))
            cells += [f"{seconds:.0f}", f"{rate:.0f}", *_costs(own[-1])]
            lines.append(f"| {name} | mean | {' | '.join(cells)} |")
    return "\n".join(lines)


def _costs(row: dict[str, Any]) -> list[str]:
    """Memory, and collectives per step with the method's own in brackets; rows of older versions have neither."""
    if "collectives" not in row:
        return ["-", "-"]
    return [f"{row['memory_gb']:.2f}", f"{row['collectives']} ({row['own_collectives']})"]


def main(
    script: str, title: str, variants: dict[str, Variant], *, of: str, about: str, description: str | None
) -> None:
    """Run the variants and seeds asked for; write the table of these and of what was measured before.

    Args:
        script: its name without suffix; also of the results.
        title, of, about: what the page says: heading, first column, what is compared.
        variants: by the names that the table shows.
        description: of the script, for `--help`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=list(variants), default=list(variants), metavar="NAME")
    arguments = parser.parse_args()
    results = RESULTS / f"{script}.json"
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in arguments.variants:
        for seed in arguments.seeds:
            folder = ROOT / "runs" / f"bench-{script}" / f"{name.split()[0]}-seed{seed}"
            row = {"variant": name, **measure(variants[name], folder, seed=seed, ranks=arguments.ranks)}
            rows = json.loads(results.read_text()) if results.is_file() else []
            rows = [*(old for old in rows if (old["variant"], old["seed"]) != (name, seed)), row]
            results.write_text(json.dumps(rows, indent=1) + "\n")
            environment = row["environment"]
            (RESULTS / f"{script}.md").write_text(
                f"# {title}\n\n"
                f"`python -m benchmarks.{script}` on {environment['processor']}, {environment['cpu_cores']} cores, "
                f"{arguments.ranks} ranks, torch {environment['torch']}. Top-1 in percent on 2,000 test images that no "
                "choice was made on; bank and probe: the 10,000 training images; kNN with k = 20. One number's "
                "sampling error is about 0.8. The seconds include whatever else the machine did. Memory is what a rank "
                "held at most; collectives are those of a step, the method's own in brackets (others are BatchNorm's "
                f"and the gradients').{about}\n\n" + table(rows, list(variants), of=of) + "\n"
            )
