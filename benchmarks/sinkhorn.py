"""Sinkhorn against the published form, paired in one process: time, memory, collectives, and error against float64.

    python benchmarks/sinkhorn.py [--ranks 1 2 4] [--repeats 7]

The published form (SwAV's released code, and most of what came after) normalises the whole matrix in every step and
reduces one scalar and then K numbers an iteration, one assign crop after the other. Times are of the ranks' slowest, in
milliseconds. Memory is what a form holds at most beside the scores. The limit of an iteration is a look at every score,
at the speed of a copy of them that is measured in the same turn. Writes benchmarks/results/sinkhorn.json and
sinkhorn.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from largescale.methods.sinkhorn import sinkhorn
from largescale.run.environment import environment

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = list(product((256, 3840, 16384), (300, 3000, 16384)))
"""Rows of each rank for one assign crop, and prototypes."""
MOST_NUMBERS = {"cpu": 2**27, "cuda": 2**30}
"""Scores of all ranks on one machine; a size beyond is left out, since float64 and both forms must fit into memory."""
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
KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "kernels": lambda scores: sinkhorn(scores, epsilon=EPSILON, iterations=ITERATIONS, check_range=False, fused=True)
}
"""On CUDA alone."""


class PeakMemory(TorchDispatchMode):
    """Bytes that tensors beside `known` hold at most, of those that an operation within it gets or makes."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.peak, self._held, self._known = 0, 0, {known.untyped_storage().data_ptr()}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for one in pytree.tree_leaves((arguments, options, result)):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in self._known:
                self._add(one.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        self._known.add(place)
        self._held += size
        self.peak = max(self.peak, self._held)
        weakref.finalize(storage, self._freed, place, size)

    def _freed(self, place: int, size: int) -> None:
        self._known.discard(place)
        self._held -= size


def measure(rank: int, world_size: int, repeats: int, folder: str) -> None:
    """Time all sizes on this rank, over gloo; rank 0 writes `rows.json` to the folder that the ranks meet in.

    Collectives: every rank must call it.
    """
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    rows = [
        {"ranks": world_size} | compare(*size, repeats, torch.device("cpu"))
        for size in SIZES
        if fits(*size, world_size)
    ]
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps({"rows": rows, "environment": environment()}))
    dist.destroy_process_group()


def fits(num_rows: int, num_prototypes: int, ranks: int, device: str = "cpu") -> bool:
    """Whether a size can be measured on one machine."""
    return CROPS * num_rows * num_prototypes * ranks <= MOST_NUMBERS[device]


def compare(num_rows: int, num_prototypes: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Times and errors at one size; forms take turns, so that what disturbs the machine meets all.

    Collectives: every rank must call it.
    """
    generator = torch.Generator().manual_seed(dist.get_rank())
    features = torch.nn.functional.normalize(torch.randn(CROPS, num_rows, 128, generator=generator), dim=-1)
    shared = torch.randn(num_prototypes, 128, generator=torch.Generator().manual_seed(99))
    scores = (features @ torch.nn.functional.normalize(shared, dim=-1).T).to(device)
    exact = FORMS["ours"](scores.double())
    row: dict[str, Any] = {"rows_a_rank": num_rows, "prototypes": num_prototypes}
    forms = FORMS | (KERNELS if device.type == "cuda" else {})
    for name, form in forms.items():
        with PeakMemory(scores) as memory:
            codes = form(scores)
        row |= {f"{name}_error": float((codes - exact).abs().max()), f"{name}_mb": memory.peak / 1e6}
    del exact, codes
    copied = torch.empty_like(scores)
    turns = {**forms, "copy": lambda scores: copied.copy_(scores)}
    times: dict[str, list[float]] = {name: [] for name in turns}
    for repeat in range(repeats + 2):
        for name, form in turns.items():
            dist.barrier()
            _synchronize(device)
            started = time.perf_counter()
            form(scores)
            _synchronize(device)
            elapsed = torch.tensor(1000 * (time.perf_counter() - started), device=device)
            dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
            if repeat >= 2:  # the first two warm up
                times[name].append(float(elapsed))
    row |= {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    # A copy reads and writes; a look only reads. Codes must be written too, which the limit leaves out.
    row["limit_ms"] = ITERATIONS * row.pop("copy_ms") / 2
    best = "kernels" if "kernels" in forms else "ours"
    if best == "kernels":
        row["kernels_device_ms"] = replayed_ms(lambda: forms[best](scores), repeats)
    row["ratio"] = statistics.median(a / b for a, b in zip(times["published"], times[best], strict=True))
    return row


def replayed_ms(form: Callable[[], object], repeats: int) -> float:
    """Milliseconds on the device alone, of one process: what the host takes to start kernels is hidden in a step."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        form()
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| ranks | rows a rank | prototypes | published ms | ours ms | times faster | share of the limit "
        "| published MB | ours MB | error published | error ours |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['ranks']} | {CROPS} x {row['rows_a_rank']} | {row['prototypes']} | {row['published_ms']:.1f} | "
        f"{row['ours_ms']:.1f} | {row['ratio']:.2f} | {row['limit_ms'] / row['ours_ms']:.0%} | "
        f"{row['published_mb']:.0f} | {row['ours_mb']:.0f} | {row['published_error']:.1e} | {row['ours_error']:.1e} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"rows": []}
    for ranks in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(measure, (ranks, arguments.repeats, folder), ranks)
            found = json.loads((Path(folder) / "rows.json").read_text())
        result = {"rows": result["rows"] + found["rows"], "environment": found["environment"]}
    machine = result["environment"]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "sinkhorn.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "sinkhorn.md").write_text(
        "# Sinkhorn against the published form\n\n"
        f"`python benchmarks/sinkhorn.py` on {time.strftime('%Y-%m-%d')}: {machine['processor']}, "
        f"{machine['cpu_cores']} cores, torch {machine['torch']}, gloo ranks on one machine, {CROPS} assign crops, "
        f"epsilon {EPSILON}, {ITERATIONS} iterations, float32; medians of {arguments.repeats} paired repeats. "
        f"All-reduces a step: {CROPS * (1 + ITERATIONS)} published, {ITERATIONS} ours. Memory: at most, beside the "
        "scores. The limit: a look at every score per iteration, at the speed of a copy measured in the same turns. "
        "Errors: largest difference from the same codes in float64. Left out: more than "
        f"{MOST_NUMBERS['cpu']:,} scores on the machine.\n\n" + table(result["rows"]) + "\n"
    )


if __name__ == "__main__":
    main()
