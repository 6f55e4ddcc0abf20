"""Memory and time of losses over pairs of dimensions: directly, and from Gram matrices of the batch.

    python -m benchmarks.gram [--batch 2048] [--dimensions 8192]

Each loss in each form, forward and backward on one process in a process of its own: on a GPU its peak of allocated
memory, on a CPU that of resident memory, less what was there before. Writes benchmarks/results/gram.md.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import resource
import time
from pathlib import Path

import torch

from largescale.methods.losses import cross_correlation, variance_covariance
from largescale.run.environment import environment

RESULTS = Path(__file__).resolve().parent / "results"
LOSSES = {"cross_correlation": cross_correlation, "variance_covariance": variance_covariance}
HEADER = ["loss", "form", "value", "peak GB", "seconds"]


def measure(loss: str, form: str, batch: int, dimensions: int, device: str) -> tuple[float, float, float]:
    """Value, peak of memory in GB beyond the embeddings, and seconds."""
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(2, batch, dimensions, generator=generator).to(device).requires_grad_()
    LOSSES[loss](*views[:, :64, :64], form=form).backward()
    views.grad = None
    before, start = memory(device), time.perf_counter()
    value = LOSSES[loss](*views, form=form)
    value.backward()
    value_read = value.item()
    return value_read, (memory(device) - before) / 1e9, time.perf_counter() - start


def memory(device: str) -> int:
    """Bytes: the peak so far."""
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure each loss in both forms, each in a process of its own, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--dimensions", type=int, default=8192)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for loss in LOSSES:
        for form in ("direct", "gram"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                value, peak, seconds = pool.apply(measure, (loss, form, arguments.batch, arguments.dimensions, device))
            rows.append([loss, form, f"{value:.6g}", f"{peak:.2f}", f"{seconds:.3g}"])
    lines = [" | ".join(cells) for cells in (HEADER, ["---"] * len(HEADER), *rows)]
    path = RESULTS / "gram.md"
    about = (
        f"`python -m benchmarks.gram` on {datetime.date.today()}: {hardware(device)}, torch {torch.__version__}, "
        f"float32, {arguments.batch} images, {arguments.dimensions} dimensions, one process. Peak memory of forward "
        "and backward beyond the embeddings; times include whatever else the machine did."
    )
    table = "".join(f"| {line} |\n" for line in lines)
    path.write_text(f"# Losses over pairs of dimensions, directly and from Gram matrices\n\n{about}\n\n{table}")
    print(path.read_text())


def hardware(device: str) -> str:
    """What it ran on."""
    return torch.cuda.get_device_name() if device == "cuda" else f"{environment()['processor']}, CPU"


if __name__ == "__main__":
    main()
