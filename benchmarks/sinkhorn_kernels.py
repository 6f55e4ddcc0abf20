"""How Sinkhorn's kernels are best launched, and how near they come to the bandwidth of the memory. On a GPU alone.

    python benchmarks/sinkhorn_kernels.py [--out DIR]

For each size, programs of 4 to 32 warps, of which so many run that a multiprocessor has 16 to 64 warps. Times are of
the device: replays of a graph of one call, in a group of one, medians. The floor is what an assignment must move, n + 1
reads of the scores and a write of the codes, at the speed of a copy of the scores that is measured beside it; scores
that fit into the cache can take less. Errors are the largest differences from codes in float64. Writes
sinkhorn_kernels.md to benchmarks/results.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's library, installed or not

import torch
import triton
from sinkhorn import CROPS, EPSILON, ITERATIONS, RESULTS, replayed_ms

from largescale.methods import sinkhorn_kernels
from largescale.methods.sinkhorn import sinkhorn

SIZES = [(256, 3000), (3840, 300), (3840, 3000), (3840, 16384), (16384, 3000)]
"""Rows for one assign crop, and prototypes."""
WARPS, WARPS_A_PROCESSOR = (4, 8, 16, 32), (16, 32, 48, 64)
_MOST_A_THREAD = 64
"""Scores: with more, a program does not fit into the registers by far."""
REPEATS = 15


def rows_of(num_rows: int, num_prototypes: int, device: torch.device) -> list[str]:
    """The lines of a size, one for each way to launch."""
    features = torch.nn.functional.normalize(torch.randn(CROPS, num_rows, 128, device=device), dim=-1)
    scores = features @ torch.nn.functional.normalize(torch.randn(num_prototypes, 128, device=device), dim=-1).T
    options = {"epsilon": EPSILON, "iterations": ITERATIONS, "check_range": False}
    exact, copied = sinkhorn(scores.double(), **options), torch.empty_like(scores)
    floor = (ITERATIONS + 2) / 2 * replayed_ms(lambda: copied.copy_(scores), REPEATS)
    block, used = triton.next_power_of_2(num_prototypes), sinkhorn_kernels._shape(num_prototypes)["num_warps"]
    lines = []
    for most in WARPS_A_PROCESSOR:
        for warps in (warps for warps in WARPS if block <= 32 * warps * _MOST_A_THREAD):
            shape = {"block": block, "num_warps": warps}
            with (
                patch.object(sinkhorn_kernels, "_WARPS_A_PROCESSOR", most),
                patch.object(sinkhorn_kernels, "_shape", lambda _, shape=shape: shape),
            ):
                error = float((sinkhorn(scores, **options, fused=True) - exact).abs().max())
                took = replayed_ms(lambda: sinkhorn(scores, **options, fused=True), REPEATS)
            own = " (used)" if (most, warps) == (sinkhorn_kernels._WARPS_A_PROCESSOR, used) else ""
            lines.append(
                f"| {CROPS} x {num_rows} | {num_prototypes} | {warps} | {most}{own} | {took:.4f} | {floor:.4f} "
                f"| {took / floor:.2f} | {error:.1e} |"
            )
    return lines


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where the page goes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    device = torch.device("cuda")
    lines = [line for size in SIZES for line in rows_of(*size, device)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    page = arguments.out / "sinkhorn_kernels.md"
    page.write_text(
        f"# Sinkhorn's kernels\n\n`python benchmarks/sinkhorn_kernels.py` on {time.strftime('%Y-%m-%d')}: "
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; epsilon {EPSILON}, {ITERATIONS} iterations.\n\n"
        "| rows | prototypes | warps a program | warps a multiprocessor | ms | floor ms | times the floor | error |\n"
        "|---|---|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )
    print(page.read_text())


if __name__ == "__main__":
    main()
