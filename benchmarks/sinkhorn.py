"""Sinkhorn against the published form, paired in one process: time, collectives, and error against float64.

    python benchmarks/sinkhorn.py [--ranks 2] [--repeats 15]

The published form (SwAV's released code, and most of what came after) normalises the whole matrix in every step and
reduces one scalar and then K numbers an iteration, one assign crop after the other. Writes
benchmarks/results/sinkhorn.json and sinkhorn.md. Times are of the ranks' slowest, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from largescale.methods.sinkhorn import sinkhorn
from largescale.run.environment import environment

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = [(64, 3000), (512, 3000), (3840, 3000), (64, 16384)]
"""Rows of each rank for one assign crop, and prototypes."""
CROPS, EPSILON, ITERATIONS = 2, 0.05, 3


def published(scores: Tensor) -> Tensor:
    """Codes of one assign crop [B, K] as the released code makes them; 1 + ITERATIONS all-reduces."""
    q = torch.exp(scores / EPSILON).t()
    num_rows, num_prototypes = q.shape[1] * dist.get_world_size(), q.shape[0]
    total = q.sum()
    dist.all_reduce(total)
    q /= total
    for _ in range(ITERATIONS):
        row_sums = q.sum(1, keepdim=True)
        dist.all_reduce(row_sums)
        q /= row_sums
        q /= num_prototypes
        q /= q.sum(0, keepdim=True)
        q /= num_rows
    q *= num_rows
    return q.t()


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "published": lambda scores: torch.stack([published(crop) for crop in scores]),
    "ours": lambda scores: sinkhorn(scores, epsilon=EPSILON, iterations=ITERATIONS, check_range=False),
}


def measure(rank: int, world_size: int, repeats: int, folder: str) -> None:
    """Time all sizes on this rank, over gloo; rank 0 writes `rows.json` to the folder that the ranks meet in.

    Collectives: every rank must call it.
    """
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    rows = [compare(*size, repeats, torch.device("cpu")) for size in SIZES]
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps({"rows": rows, "environment": environment()}))
    dist.destroy_process_group()


def compare(num_rows: int, num_prototypes: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Times and errors at one size; forms take turns, so that what disturbs the machine meets both.

    Collectives: every rank must call it.
    """
    generator = torch.Generator().manual_seed(dist.get_rank())
    features = torch.nn.functional.normalize(torch.randn(CROPS, num_rows, 128, generator=generator), dim=-1)
    shared = torch.randn(num_prototypes, 128, generator=torch.Generator().manual_seed(99))
    scores = (features @ torch.nn.functional.normalize(shared, dim=-1).T).to(device)
    exact = FORMS["ours"](scores.double())
    row: dict[str, Any] = {"rows_a_rank": num_rows, "prototypes": num_prototypes}
    times: dict[str, list[float]] = {name: [] for name in FORMS}
    for repeat in range(repeats + 2):
        for name, form in FORMS.items():
            dist.barrier()
            _synchronize(device)
            started = time.perf_counter()
            codes = form(scores)
            _synchronize(device)
            elapsed = torch.tensor(1000 * (time.perf_counter() - started), device=device)
            dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
            if repeat >= 2:  # the first two warm up
                times[name].append(float(elapsed))
            row[f"{name}_error"] = float((codes - exact).abs().max())
    row |= {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    row["ratio"] = statistics.median(a / b for a, b in zip(times["published"], times["ours"], strict=True))
    return row


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| rows a rank | prototypes | published ms | ours ms | times faster | error published | error ours |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {CROPS} x {row['rows_a_rank']} | {row['prototypes']} | {row['published_ms']:.1f} | "
        f"{row['ours_ms']:.1f} | {row['ratio']:.2f} | {row['published_error']:.1e} | {row['ours_error']:.1e} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(measure, (arguments.ranks, arguments.repeats, folder), arguments.ranks)
        result = json.loads((Path(folder) / "rows.json").read_text())
    machine = result["environment"]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "sinkhorn.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "sinkhorn.md").write_text(
        "# Sinkhorn against the published form\n\n"
        f"`python benchmarks/sinkhorn.py` on {time.strftime('%Y-%m-%d')}: {machine['processor']}, "
        f"{machine['cpu_cores']} cores, torch {machine['torch']}, {arguments.ranks} gloo ranks on one machine, "
        f"{CROPS} assign crops, epsilon {EPSILON}, {ITERATIONS} iterations, float32; medians of {arguments.repeats} "
        f"paired repeats. All-reduces a step: {CROPS * (1 + ITERATIONS)} published, {ITERATIONS} ours. Errors: largest "
        "difference from the same codes in float64.\n\n" + table(result["rows"]) + "\n"
    )


if __name__ == "__main__":
    main()
