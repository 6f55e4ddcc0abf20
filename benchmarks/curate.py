"""Curation of a large pile in bounded memory, on several numbers of ranks, and killed.

    python -m benchmarks.curate [--images 1000000] [--width 128] [--ranks 1 3]

Embeddings are a mixture of 4,000 normals whose sizes fall as 1 / rank, in files as `largescale features` writes them;
one image in ten is a near copy of the one before it. Every rank has one thread. Last it is killed on one rank, halfway
through the duplicates, and continued on the last number of ranks. About 10 minutes of a core for each. Writes
benchmarks/results/curate.json and .md.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gram import hardware
from largescale.evaluate import feature_files
from largescale.evaluate.feature_files import ShardFeatures

RESULTS = Path(__file__).resolve().parent / "results"
OF_SHARD, BLOBS = 10_000, 4000


def write_pile(folder: Path, num: int, width: int) -> None:
    """Write the embeddings, a shard at a time."""
    generator = np.random.default_rng(0)
    weights = 1 / np.arange(1, BLOBS + 1)
    centres = generator.normal(size=(BLOBS, width))
    for shard, start in enumerate(range(0, num, OF_SHARD)):
        part = min(OF_SHARD, num - start)
        rows = centres[generator.choice(BLOBS, part, p=weights / weights.sum())]
        rows = rows + 0.5 * generator.normal(size=(part, width))
        copies = np.arange(9, part, 10)
        rows[copies] = rows[copies - 1] + 0.01 * generator.normal(size=(len(copies), width))
        name = f"pile-{shard:06d}.tar"
        keys = [f"{one:09d}" for one in range(start, start + part)]
        found = ShardFeatures(name, keys, np.arange(part), rows.astype(np.float16))
        about = {"shard": {"tar": name, "samples": part}, "format": "parquet", "dtype": "fp16"}
        feature_files.write(folder, "parquet", found, about)


def command(features: Path, out: Path, ranks: int, options: argparse.Namespace) -> list[str]:
    """That curates the features."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    wanted = ["--levels", options.levels, "--target", str(options.images // 5), "--dedup", "0.005"]
    return [sys.executable, *launch, "-m", "largescale", "curate", str(features), str(out), *wanted]


def run(features: Path, out: Path, ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run the command to its end: seconds, subset and record."""
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command(features, out, ranks, options), check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    record = json.loads((out / "curation.json").read_text())
    return {
        "ranks": str(ranks),
        "wall_s": time.perf_counter() - begun,
        "cpu_s": used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime,
        "stages_s": record["seconds"],
        "peak_gb": record["peak_memory_bytes"] / 1e9,
        "dropped": record["num_duplicates"],
        "kept": record["num_kept"],
        "subset": hashlib.sha256((out / "subset.npy").read_bytes()).hexdigest(),
    }


def kill(features: Path, out: Path, options: argparse.Namespace) -> None:
    """Kill the command on one rank once half of the coarse clusters have been searched for duplicates."""
    work = out.with_name(f"{out.name}.unfinished")
    with subprocess.Popen(command(features, out, 1, options), env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        while process.poll() is None:
            if len(list(work.glob("dropped-*.npz"))) > math.isqrt(options.images) // 2:
                process.kill()
            time.sleep(0.1)
        if process.returncode != -signal.SIGKILL:
            sys.exit("error: it ended before it could be killed")


def page(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    same = "the same bytes" if len({row["subset"] for row in record["rows"]}) == 1 else "DIFFERENT subsets"
    lines = [
        "# Curation of a large pile",
        "",
        f"{record['date']}, {record['hardware']}.",
        f"`{record['command']}`",
        "",
        f"{record['images']:,} embeddings of {record['width']} numbers in fp16 "
        f"({record['images'] * record['width'] * 2 / 1e9:.2f} GB), levels {record['levels']}, target "
        f"{record['images'] // 5:,}, epsilon 0.005; one in ten is a near copy. All found {same}. Peak: resident memory "
        f"of rank 0, with libraries. CPU: of all ranks. Wall time includes what else the machine did.",
        "",
        "| ranks | wall seconds | CPU seconds | wall, by stage | peak, GB | dropped | kept |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        stages = ", ".join(f"{name} {value:.0f}" for name, value in row["stages_s"].items())
        lines.append(
            f"| {row['ranks']} | {row['wall_s']:.0f} | {row['cpu_s']:.0f} | {stages} | {row['peak_gb']:.2f} | "
            f"{row['dropped']:,} | {row['kept']:,} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--levels", default="20000,1000,100")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--no-kill", dest="kill", action="store_false")
    parser.add_argument("--out", type=Path, default=RESULTS / "curate.md")
    options = parser.parse_args()
    record: dict[str, Any] = {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "hardware": hardware("cpu"),
        "command": f"python -m benchmarks.curate {' '.join(sys.argv[1:])}".strip(),
        "images": options.images,
        "width": options.width,
        "levels": options.levels,
        "rows": [],
    }

    def add(row: dict[str, Any]) -> None:
        record["rows"].append(row)
        print(row, flush=True)
        options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        options.out.write_text(page(record))

    with tempfile.TemporaryDirectory() as folder:
        features = Path(folder) / "features"
        write_pile(features, options.images, options.width)
        for ranks in options.ranks:
            add(run(features, Path(folder) / f"out-{ranks}", ranks, options))
        if options.kill:
            out = Path(folder) / "out-killed"
            kill(features, out, options)
            add({**run(features, out, options.ranks[-1], options), "ranks": f"1, killed; then {options.ranks[-1]}"})
    print(page(record))
    if len({row["subset"] for row in record["rows"]}) > 1:
        sys.exit("error: numbers of ranks found different subsets")


if __name__ == "__main__":
    main()
