"""k-means beside faiss: objective and time from the same start, after the same number of iterations.

    python -m benchmarks.kmeans [--points 1000000] [--width 128] [--clusters 1000 10000] [--iterations 10 3] [--pairs 2]

Vectors are a mixture of normals. Each run is a process of its own with two threads, one after the other in pairs; both
end with an assignment of all points, and the objective of both is computed by the same code. About 12 minutes on two
cores. faiss is no dependency: where `import faiss` fails, a line says so and only this package's k-means is measured.
Writes benchmarks/results/kmeans.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gram import hardware
from largescale.clustering.kmeans import kmeans, nearest_centroids

RESULTS = Path(__file__).resolve().parent / "results"
HEADER = ["clusters", "iterations", "of", "seconds", "mean squared distance"]
SAMPLE = 2000
THREADS = 2


def mixture(num: int, width: int, path: Path) -> None:
    """Write vectors of 4,000 normals whose sizes fall as 1 / rank^(1/2)."""
    generator = np.random.default_rng(0)
    weights = np.arange(1, 4001) ** -0.5
    centres = generator.normal(size=(4000, width)).astype(np.float32)
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (num, width))
    for start in range(0, num, 50_000):
        part = min(50_000, num - start)
        of = generator.choice(4000, part, p=weights / weights.sum())
        rows[start : start + part] = centres[of] + generator.normal(size=(part, width)).astype(np.float32)
    rows.flush()


def ours(points: np.ndarray, start: np.ndarray, iterations: int) -> np.ndarray:
    """Centroids of this package."""
    found = kmeans(torch.from_numpy(points), len(start), seed=0, iterations=iterations, start=torch.from_numpy(start))
    return found.centroids.numpy()


def faiss(points: np.ndarray, start: np.ndarray, iterations: int) -> np.ndarray:
    """Centroids of faiss, on all points, with an assignment at the end as ours has."""
    import faiss as library

    library.omp_set_num_threads(THREADS)
    options = {"niter": iterations, "max_points_per_centroid": 10**9, "min_points_per_centroid": 1}
    found = library.Kmeans(points.shape[1], len(start), **options)
    found.train(points, init_centroids=start)
    found.index.search(points, 1)
    return np.asarray(found.centroids)


SYSTEMS = {"ours": ours, "faiss": faiss}


def run_one(system: str, path: Path, clusters: int, iterations: int) -> dict[str, float]:
    """Seconds and objective of one run, in this process."""
    torch.set_num_threads(THREADS)
    points = np.load(path)
    start = points[np.sort(np.random.default_rng(1).choice(len(points), clusters, replace=False))].copy()
    begun = time.perf_counter()
    centroids = SYSTEMS[system](points, start, iterations)
    seconds = time.perf_counter() - begun
    every = torch.from_numpy(points[:: max(1, len(points) // 100_000)])
    nearest = torch.from_numpy(centroids)[nearest_centroids(every, torch.from_numpy(centroids))]
    return {"seconds": seconds, "objective": float((every - nearest).double().square().sum(1).mean())}


def measure(systems: list[str], options: argparse.Namespace, path: Path) -> list[list[str]]:
    """Rows of the table."""
    rows = []
    for clusters, iterations in zip(options.clusters, options.iterations, strict=True):
        found: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
        for pair in range(options.pairs):
            for system in systems[:: 1 if pair % 2 == 0 else -1]:
                command = [sys.executable, "-m", "benchmarks.kmeans", "--one", system, str(path)]
                command += [str(clusters), str(iterations)]
                result = subprocess.run(command, capture_output=True, text=True, check=True)
                found[system].append(json.loads(result.stdout))
                print(clusters, iterations, system, found[system][-1], flush=True)
        for system in systems:
            seconds = statistics.median(one["seconds"] for one in found[system])
            rows.append(
                [f"{clusters:,}", str(iterations), system, f"{seconds:.1f}", f"{found[system][0]['objective']:.4f}"]
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--clusters", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--iterations", type=int, nargs="+", default=[10, 3], help="for each number of clusters")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "kmeans.md")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        system, path, clusters, iterations = options.one
        print(json.dumps(run_one(system, Path(path), int(clusters), int(iterations))))
        return
    systems = ["ours"]
    if importlib.util.find_spec("faiss"):
        systems.append("faiss")
    else:
        print("faiss is not installed (pip install faiss-cpu): ours alone is measured")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "points.npy"
        mixture(options.points, options.width, path)
        rows = measure(systems, options, path)
    lines = [
        "# k-means beside faiss",
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {hardware('cpu')}, {THREADS} threads.",
        f"`python -m benchmarks.kmeans {' '.join(sys.argv[1:])}`".replace(" `", "`"),
        "",
        f"{options.points:,} vectors of {options.width} numbers, equal starts and iterations; median of "
        f"{options.pairs} runs in pairs.",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
    options.out.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
