"""Accuracies of recipes over seeds, the way of `make pretrain`: torchrun, `largescale evaluate`, a table."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
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

TASK = ("task_accuracy", "task_chance", "unexplained")
"""Of the last logged interval: what a pretext task says of itself."""

FASHION = (
    "2,000 test images that no choice was made on; bank and probe: the 10,000 training images; kNN with k = 20. One "
    "number's sampling error is about 0.8."
)
"""What the demo's shards are measured on."""

_ONE_PLAN = threading.Lock()
"""A plan is a process group of its own, of which a process has one."""


@dataclass(frozen=True)
class Variant:
    """A recipe, and what is set differently in it."""

    recipe: str
    overrides: Sequence[str] = ()


def measure(variant: Variant, folder: Path, *, seed: int, ranks: int, jobs: int = 1) -> dict[str, Any]:
    """Train and evaluate with one seed: accuracies in percent, the training time, the environment."""
    threads = str(max(1, (os.cpu_count() or 1) // (ranks * jobs)))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    run = partial(subprocess.run, cwd=ROOT, check=True, env=environment, capture_output=jobs > 1)
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launch, "-m", "largescale", "pretrain", variant.recipe, f"run.dir={folder}", f"run.seed={seed}"]
    run([*command, *variant.overrides])
    row: dict[str, Any] = {"seed": seed, "ranks": ranks, "jobs": jobs}
    for protocol in ("knn", "linear"):
        run([sys.executable, "-m", "largescale", "evaluate", protocol, folder])
        results = json.loads((folder / "eval" / f"{protocol}.json").read_text())["results"]
        row |= {f"{protocol} {network}": 100 * result["top1"] for network, result in results.items()}
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [-1, *(line["step"] for line in metrics)]
    row["train_s"] = sum(line["step_s"] * (line["step"] - before) for line, before in zip(metrics, steps, strict=False))
    row["images_per_s"] = metrics[-1]["images_seen"] / row["train_s"]
    row["memory_gb"] = max(line["peak_memory_bytes"] for line in metrics) / 1e9
    row |= {key: metrics[-1][key] for key in TASK if key in metrics[-1]}
    row["collectives"], row["own_collectives"] = collectives(folder, ranks)
    row["environment"] = json.loads((folder / "environment.json").read_text())
    del row["environment"]["command"]
    return row


def collectives(folder: Path, ranks: int) -> tuple[int, int]:
    """Per step of a run: all, and those that are neither BatchNorm's nor of weights and gradients."""
    with _ONE_PLAN:
        counts = simulate(load_config(folder / "config.yaml"), ranks).counts
    own = sum(number for what, number in counts.items() if what.of not in (WEIGHTS, STATISTICS))
    return counts.total(), own


def table(rows: list[dict[str, Any]], names: Sequence[str], *, of: str, machines: Sequence[str]) -> str:
    """The results as Markdown: each seed, and the mean of each variant; speed is averaged over one machine's seeds."""
    columns = [*COLUMNS, "task (chance)"] if any(key in row for row in rows for key in TASK) else COLUMNS
    lines = [
        f"| {of} | seed | on | " + " | ".join(columns) + " | training s | images/s | GB per rank | collectives |",
        "|---|---|---|" + "---|" * (len(columns) + 4),
    ]
    for name in names:
        own = sorted((row for row in rows if row["variant"] == name), key=lambda row: row["seed"])
        for row in own:
            cells = [f"{row[column]:.2f}" for column in COLUMNS]
            cells += [_task(row)] * (len(columns) > len(COLUMNS))
            cells += [f"{row['train_s']:.0f}", f"{row['images_per_s']:.0f}", *_costs(row)]
            lines.append(f"| {name} | {row['seed']} | {_letter(row, machines)} | {' | '.join(cells)} |")
        if own:
            letters = sorted({_letter(row, machines) for row in own})
            timed = [row for row in own if _letter(row, machines) == letters[0]]
            cells = [f"**{statistics.mean(row[column] for row in own):.2f}**" for column in COLUMNS]
            cells += [""] * (len(columns) > len(COLUMNS))
            seconds, rate = (statistics.mean(row[key] for row in timed) for key in ("train_s", "images_per_s"))
            cells += [f"{seconds:.0f}", f"{rate:.0f}", *_costs(timed[-1])]
            lines.append(f"| {name} | mean | {', '.join(letters)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(row: dict[str, Any]) -> str:
    """What a run was made on, in words."""
    environment = row["environment"]
    ranks, jobs = row.get("ranks", environment["world_size"]), row.get("jobs", 1)
    device = "" if environment["devices"][0] == "cpu" else f"{environment['devices'][0]} and "
    beside = f", {jobs} runs at once" if jobs > 1 else ""
    return (
        f"{device}{environment['processor']}, {environment['cpu_cores']} cores, {ranks} rank{'s' * (ranks > 1)}"
        f"{beside}, torch {environment['torch']}"
    )


def _letter(row: dict[str, Any], machines: Sequence[str]) -> str:
    return "abcdefgh"[machines.index(machine(row))]


def _task(row: dict[str, Any]) -> str:
    """The share told right and that of chance, or what of the variance is missing; older rows have neither."""
    if "task_accuracy" in row:
        return f"{100 * row['task_accuracy']:.1f} ({100 * row.get('task_chance', 0.5):.1f})"
    return f"{100 * row['unexplained']:.1f} missing" if "unexplained" in row else "-"


def _costs(row: dict[str, Any]) -> list[str]:
    """Memory, and collectives per step with the method's own in brackets; rows of older versions have neither."""
    if "collectives" not in row:
        return ["-", "-"]
    return [f"{row['memory_gb']:.2f}", f"{row['collectives']} ({row['own_collectives']})"]


def main(
    script: str,
    title: str,
    variants: dict[str, Variant],
    *,
    of: str,
    about: str,
    description: str | None,
    images: str = FASHION,
) -> None:
    """Run the variants and seeds asked for; write the table of these and of what was measured before.

    Args:
        script: its name without suffix; also of the results.
        title, of, about: what the page says: heading, first column, what is compared.
        variants: by the names that the table shows.
        description: of the script, for `--help`.
        images: that accuracies are on, as the page says it.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=list(variants), default=list(variants), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, where a GPU or many cores have room")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    written, failed = threading.Lock(), list[str]()

    def one(name: str, seed: int) -> None:
        folder = ROOT / "runs" / f"bench-{script}" / f"{name.split()[0]}-seed{seed}"
        try:
            row = measure(variants[name], folder, seed=seed, ranks=arguments.ranks, jobs=arguments.jobs)
        except subprocess.CalledProcessError as error:
            failed.append(
                f"{name}, seed {seed}: exit code {error.returncode}\n{(error.stderr or b'').decode()[-2000:]}"
            )
            return
        with written:
            write(script, title, {"variant": name, **row}, variants, of=of, about=about, images=images)
        print(f"{name}, seed {seed}: {row['linear pretrained']:.2f} linear, {row['train_s']:.0f} s", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(one, *zip(*product(arguments.variants, arguments.seeds), strict=True)))
    if failed:
        sys.exit("\n".join(failed))


def write(
    script: str,
    title: str,
    row: dict[str, Any],
    variants: dict[str, Variant],
    *,
    of: str,
    about: str,
    images: str = FASHION,
) -> None:
    """Put a row in the place of an older one of the same variant and seed, and write the page again."""
    results = RESULTS / f"{script}.json"
    rows = json.loads(results.read_text()) if results.is_file() else []
    key = (row["variant"], row["seed"])
    rows = [*(old for old in rows if (old["variant"], old["seed"]) != key), row]
    results.write_text(json.dumps(rows, indent=1) + "\n")
    machines = list(dict.fromkeys(machine(row) for row in rows))
    on = "; ".join(f"{letter}: {about_it}" for letter, about_it in zip("abcdefgh", machines, strict=False))
    (RESULTS / f"{script}.md").write_text(
        f"# {title}\n\n"
        f"`python -m benchmarks.{script}` on {on}. Top-1 in percent on {images} The seconds include whatever else the "
        "machine did. Memory is what a rank held at most; collectives are those of a step, the method's own in "
        "brackets (others are BatchNorm's "
        f"and the gradients').{about}\n\n" + table(rows, list(variants), of=of, machines=machines) + "\n"
    )
