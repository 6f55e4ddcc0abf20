"""Weak scaling on paper: images/s and efficiency that `largescale plan` predicts from 8 to 2,048 H100.

    python benchmarks/weak_scaling.py [--gpu h100]

The batch grows with the GPUs. Efficiency is images/s a GPU, as a share of those on 8. Each network is planned with
Sinkhorn's exchanges waited for, as by default, and hidden behind the small crops (`method.head_per_group`). Writes
benchmarks/results/weak_scaling.json, weak_scaling.md and docs/weak-scaling.svg. Nothing here is measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tqdm import tqdm

from largescale.config import load_config
from largescale.plan.planner import Request, plan

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

NETWORKS = {
    "ResNet-50, ddp": ("swav/resnet50_800ep.yaml", 64, []),
    "RegNetY-32gf, fsdp": ("seer/regnety_32gf.yaml", 16, []),
    "RegNetY-256gf, fsdp": ("seer/regnety_256gf.yaml", 16, []),
    "RegNetY-256gf, HSDP of 64": ("seer/regnety_256gf.yaml", 16, ["parallel.shard=64"]),
}
"""Recipe, images per GPU, changes."""

GPUS = (8, 64, 512, 2048)


def planned(recipe: str, images: int, changes: list[str], gpus: int, gpu: str) -> dict[str, Any]:
    """The plan of a recipe on a number of GPUs, with the batch in proportion, reduced to what the table shows.

    Args:
        recipe: path below `configs/`.
        images: per GPU and step.
        changes: overrides of the recipe.
        gpus, gpu: how many, and their kind.
    """
    if "parallel.shard=64" in changes:
        changes = [f"parallel.shard={min(64, gpus)}", f"parallel.replicate={max(1, gpus // 64)}"]
    config = load_config(
        ROOT / "configs" / recipe,
        [*changes, f"train.global_batch={images * gpus}", f"parallel.batchnorm_group_size={min(64, gpus)}"],
        default_shards="unset",
    )
    found = plan(config, Request(gpus, gpu), advise=False)
    step, sinkhorn = found["seconds"]["step"], found["seconds"]["of these Sinkhorn's marginals"]
    return {
        "gpus": gpus,
        "fits": found["fits"],
        "needed_gb": found["memory_gb"]["needed"],
        "step_s": step,
        "images_per_s": found["images_per_s"],
        "images_per_s_hidden": images * gpus / (step - sinkhorn),
        "waits_s": found["seconds"]["collectives it waits for"],
        "behind_s": found["seconds"]["collectives behind it"],
        "assumptions": found["assumptions"],
    }


def efficiency(rows: list[dict[str, Any]], key: str) -> list[float]:
    """Images per second and GPU, relative to the smallest number of GPUs."""
    first = rows[0][key] / rows[0]["gpus"]
    return [row[key] / row["gpus"] / first for row in rows]


def report(found: dict[str, list[dict[str, Any]]]) -> str:
    """The plans of all recipes as a table in Markdown."""
    lines = [
        "| network | GPUs | GB needed | step, ms | waits, ms | images/s | efficiency | with Sinkhorn hidden |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        for row, now, hidden in zip(
            rows, efficiency(rows, "images_per_s"), efficiency(rows, "images_per_s_hidden"), strict=True
        ):
            lines.append(
                f"| {name} | {row['gpus']:,} | {row['needed_gb']:.1f} | {1e3 * row['step_s']:.0f} | "
                f"{1e3 * row['waits_s']:.1f} | {row['images_per_s']:,.0f} | {now:.0%} | {hidden:.0%} |"
            )
    return "\n".join(lines)


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot efficiency over the number of GPUs; dotted lines are with Sinkhorn's all-reduces hidden."""
    figure, axes = plt.subplots(figsize=(7, 3.6))
    for name, rows in found.items():
        [line] = axes.plot(GPUS, efficiency(rows, "images_per_s"), "o-", label=name)
        axes.plot(GPUS, efficiency(rows, "images_per_s_hidden"), ":", color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_xticks(GPUS, [f"{gpus:,}" for gpus in GPUS])
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("predicted efficiency")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, title="dotted: Sinkhorn hidden", title_fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Plan, write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="h100")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in NETWORKS}
    for name, gpus in tqdm([(name, gpus) for name in NETWORKS for gpus in GPUS], unit="plan"):
        found[name].append(planned(*NETWORKS[name], gpus, arguments.gpu))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "weak_scaling.json").write_text(json.dumps({"gpu": arguments.gpu, "plans": found}, indent=1) + "\n")
    assumed = ", ".join(f"{key} {value}" for key, value in found[next(iter(found))][0]["assumptions"].items())
    (RESULTS / "weak_scaling.md").write_text(
        f"# Weak scaling on paper\n\n`python benchmarks/weak_scaling.py` on {time.strftime('%Y-%m-%d')}, "
        f"{arguments.gpu}; predicted by `largescale plan`, nothing measured. Assumed: {assumed}.\n\n{report(found)}\n"
    )
    draw(found, ROOT / "docs" / "weak-scaling.svg")


if __name__ == "__main__":
    main()
