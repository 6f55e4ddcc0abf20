"""Curation of a large pile in bounded memory, on one rank and on two.

    python -m benchmarks.curate [--images 1000000] [--width 128] [--ranks 1 2]

Embeddings are a mixture of 4,000 normals whose sizes fall as 1 / rank, in files as `largescale features` writes them;
one image in ten is a near copy of the one before it. Ranks share the cores. About 10 minutes on two cores. Writes
benchmarks/results/curate.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
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


def run(features: Path, out: Path, ranks: int, options: argparse.Namespace) -> tuple[float, dict[str, Any]]:
    """Seconds of the command, and its record."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    wanted = ["--levels", options.levels, "--target", str(options.images // 5), "--dedup", "0.005"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, *launch, "-m", "largescale", "curate", str(features), str(out), *wanted],
        check=True,
        env=environment,
    )
    return time.perf_counter() - begun, json.loads((out / "curation.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--levels", default="20000,1000,100")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS / "curate.md")
    options = parser.parse_args()
    lines, subsets = [], []
    with tempfile.TemporaryDirectory() as folder:
        features = Path(folder) / "features"
        write_pile(features, options.images, options.width)
        for ranks in options.ranks:
            seconds, record = run(features, Path(folder) / f"out-{ranks}", ranks, options)
            stages = ", ".join(f"{name} {value:.0f}" for name, value in record["seconds"].items())
            lines.append(
                f"| {ranks} | {seconds:.0f} | {stages} | {record['peak_memory_bytes'] / 1e9:.2f} | "
                f"{record['num_duplicates']:,} | {record['num_kept']:,} |"
            )
            subsets.append((Path(folder) / f"out-{ranks}" / "subset.npy").read_bytes())
    same = "the same bytes" if len(set(subsets)) == 1 else "DIFFERENT subsets"
    text = [
        "# Curation of a large pile",
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {hardware('cpu')}.",
        f"`python -m benchmarks.curate {' '.join(sys.argv[1:])}`".replace(" `", "`"),
        "",
        f"{options.images:,} embeddings of {options.width} numbers in fp16 "
        f"({options.images * options.width * 2 / 1e9:.2f} GB), levels {options.levels}, target "
        f"{options.images // 5:,}, epsilon 0.005; one in ten is a near copy. All numbers of ranks found {same}. Peak: "
        f"resident memory of rank 0, with libraries.",
        "",
        "| ranks | seconds | of which, by stage | peak, GB | dropped | kept |",
        "|---|---|---|---|---|---|",
        *lines,
        "",
    ]
    options.out.write_text("\n".join(text))
    print("\n".join(text))
    if len(set(subsets)) > 1:
        sys.exit("error: numbers of ranks found different subsets")


if __name__ == "__main__":
    main()
