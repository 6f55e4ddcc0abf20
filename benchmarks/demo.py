"""The demo over seeds, with and without small crops: accuracies against raw pixels and the untrained network.

    python benchmarks/demo.py [--seeds 0 1 2] [--ranks 2] [--variants NAME ...]

Every run goes the way of `make pretrain`: the same shards, torchrun, FSDP2, `largescale evaluate`. Writes
benchmarks/results/demo.json and demo.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

VARIANTS: dict[str, list[str]] = {
    "multi-crop (configs/demo.yaml)": [],
    "two crops of 28 px, as many steps": ["data.crops=[{num: 2, size: 28, scale: [0.8, 1.0]}]"],
}


def run_once(name: str, overrides: list[str], seed: int, ranks: int) -> dict[str, Any]:
    """Train and evaluate one variant with one seed; returns accuracies in percent and the training time."""
    folder = ROOT / "runs" / "bench-demo" / f"{name.split()[0]}-seed{seed}"
    threads = max(1, (os.cpu_count() or 1) // ranks)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launch, "-m", "largescale", "pretrain", "configs/demo.yaml", f"run.dir={folder}", f"run.seed={seed}"]
    subprocess.run([*command, *overrides], cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    row: dict[str, Any] = {"variant": name, "seed": seed}
    for protocol in ("knn", "linear"):
        subprocess.run([sys.executable, "-m", "largescale", "evaluate", protocol, folder], cwd=ROOT, check=True)
        results = json.loads((folder / "eval" / f"{protocol}.json").read_text())["results"]
        row |= {f"{protocol} {network}": 100 * result["top1"] for network, result in results.items()}
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [-1, *(line["step"] for line in metrics)]
    row["train_s"] = sum(line["step_s"] * (line["step"] - before) for line, before in zip(metrics, steps, strict=False))
    row["images_per_s"] = metrics[-1]["images_seen"] / row["train_s"]
    row["environment"] = json.loads((folder / "environment.json").read_text())
    del row["environment"]["command"]
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown: each seed, and the mean of each variant."""
    columns = [f"{protocol} {network}" for protocol in ("knn", "linear")
               for network in ("pretrained", "untrained", "pixels")]
    lines = ["| variant | seed | " + " | ".join(columns) + " | training s | images/s |",
             "|---|---|" + "---|" * (len(columns) + 2)]
    for variant in VARIANTS:
        own = [row for row in rows if row["variant"] == variant]
        for row in own:
            cells = [f"{row[column]:.2f}" for column in columns]
            lines.append(f"| {variant} | {row['seed']} | {' | '.join(cells)} | {row['train_s']:.0f} | "
                         f"{row['images_per_s']:.0f} |")
        if own:
            cells = [f"**{statistics.mean(row[column] for row in own):.2f}**" for column in columns]
            seconds, rate = (statistics.mean(row[key] for row in own) for key in ("train_s", "images_per_s"))
            lines.append(f"| {variant} | mean | {' | '.join(cells)} | {seconds:.0f} | {rate:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Run the variants asked for, and write the table of these and of what was measured before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    arguments = parser.parse_args()
    results = RESULTS / "demo.json"
    rows = [row for row in (json.loads(results.read_text()) if results.is_file() else [])
            if row["variant"] not in arguments.variants]
    rows += [run_once(name, VARIANTS[name], seed, arguments.ranks)
             for name in arguments.variants for seed in arguments.seeds]
    environment = rows[0]["environment"]
    RESULTS.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "demo.md").write_text(
        "# The demo over seeds\n\n"
        f"`python benchmarks/demo.py` on {environment['processor']}, {environment['cpu_cores']} cores, "
        f"{arguments.ranks} ranks, torch {environment['torch']}. Top-1 in percent on 2,000 test images that no choice "
        "was made on; bank and probe: the 10,000 training images; kNN with k = 20. One number's sampling error is "
        "about 0.8. The seconds below include whatever else the machine did.\n\n" + table(rows) + "\n"
    )


if __name__ == "__main__":
    main()
