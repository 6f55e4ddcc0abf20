"""What a save costs the training loop in the background and in the foreground, paired in one run; and by ranks.

    python benchmarks/checkpoint.py [--gigabytes 1] [--repeats 5] [--scaling 1 2 4 8]

Each rank holds its part of a state of weights and momentum, and does steps of matrix products between saves. Saves
take turns: one in the background, one in the foreground. A pause is what the loop waits in a save: the call, and what
is left of the copy when the next update wants to begin. Work is the matrix products of a step while a save is on its
way, over those of a step in peace. Writes benchmarks/results/checkpoint.json and checkpoint.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from largescale.checkpoint.saver import Saver
from largescale.run.environment import environment

RESULTS = Path(__file__).resolve().parent / "results"
_TENSORS = 64
_STEP_S = 1.5
"""Of a step between saves, about; a step of the networks that need checkpoints takes as long."""


def measure(rank: int, world_size: int, gigabytes: float, repeats: int, folder: str) -> None:
    """One rank: pauses and durations of saves."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    rows = int(gigabytes * 1e9 / 4 / 1024 / _TENSORS) // world_size * world_size
    state = {
        f"model.{number}": DTensor.from_local(torch.randn(rows // world_size, 1024), mesh, [Shard(0)], run_check=False)
        for number in range(_TENSORS)
    }
    savers = {
        name: Saver(
            Path(folder) / name, keep=1, keep_every=0, background=name == "background", device=torch.device("cpu")
        )
        for name in ("background", "foreground")
    }
    found: dict[str, list[float]] = {"background": [], "foreground": [], "written": [], "work": []}
    _step()
    for repeat in range(repeats + 1):
        in_peace = _step()
        for name, saver in savers.items():
            dist.barrier()
            started = time.perf_counter()
            saver.save(state, {"step": repeat}, until_update=set(state))
            pause = time.perf_counter() - started
            if name == "background":
                found["work"].append(_step() / in_peace)
                waiting = time.perf_counter()
                saver.wait_staged()
                pause += time.perf_counter() - waiting
                saver.wait()
                found["written"].append(time.perf_counter() - started)
            found[name].append(_slowest(pause))
    if rank == 0:
        # The first repeat allocates.
        rows_found = {name: values[1:] for name, values in found.items()}
        (Path(folder) / "found.json").write_text(json.dumps({"found": rows_found, "environment": environment()}))
    dist.destroy_process_group()


def _step() -> int:
    """Multiply matrices for as long as a training step takes; returns how often."""
    started, matrix, number = time.perf_counter(), torch.randn(512, 512), 0
    while time.perf_counter() - started < _STEP_S:
        matrix, number = torch.tanh(matrix @ matrix), number + 1
    return number


def _slowest(seconds: float) -> float:
    message = torch.tensor(seconds)
    dist.all_reduce(message, op=dist.ReduceOp.MAX)
    return float(message)


def run(world_size: int, gigabytes: float, repeats: int) -> dict[str, Any]:
    """Measure on some ranks."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        multiprocessing.spawn(measure, (world_size, gigabytes, repeats, folder), world_size)
        result = json.loads((Path(folder) / "found.json").read_text())
    found = result["found"]
    shares = [pause / blocking for pause, blocking in zip(found["background"], found["foreground"], strict=True)]
    return {
        "ranks": world_size,
        "pause_ms": 1000 * statistics.median(found["background"]),
        "blocking_ms": 1000 * statistics.median(found["foreground"]),
        "pause_share": statistics.median(shares),
        "work": statistics.median(found["work"]),
        "published_after_ms": 1000 * statistics.median(found["written"]),
        "environment": result["environment"],
    }


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scaling", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments = parser.parse_args()
    rows = [run(ranks, arguments.gigabytes, arguments.repeats) for ranks in arguments.scaling]
    machine = rows[0].pop("environment")
    for row in rows[1:]:
        row.pop("environment")
    machine.pop("command")
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "checkpoint.json").write_text(json.dumps({"rows": rows, "environment": machine}, indent=1) + "\n")
    lines = [
        "| ranks | pause of a background save | of a blocking save | pause / blocking | published after | work |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['ranks']} | {row['pause_ms']:.0f} ms | {row['blocking_ms']:.0f} ms | {row['pause_share']:.1%} | "
        f"{row['published_after_ms']:.0f} ms | {row['work']:.0%} |"
        for row in rows
    ]
    (RESULTS / "checkpoint.md").write_text(
        "# What a checkpoint costs the training loop\n\n"
        f"`python benchmarks/checkpoint.py` on {time.strftime('%Y-%m-%d')}: {machine['processor']}, "
        f"{machine['cpu_cores']} cores, torch {machine['torch']}, gloo ranks on one machine and one disk, "
        f"{arguments.gigabytes:g} GB of state in all, steps of {_STEP_S:g} s; medians of {arguments.repeats} paired "
        "repeats, the slowest rank's. Checksums, flushing to disk and publishing are part of a save; "
        "work: products of a step during a save, over one in peace.\n\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()
