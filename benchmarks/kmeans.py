"""k-means beside faiss: objective and time from the same start, after the same number of iterations.

    python -m benchmarks.kmeans [--points 1000000] [--width 128] [--clusters 1000 10000] [--iterations 10 3] [--pairs 2]

Vectors are a mixture of normals. Each run is a process of its own with one thread, one after the other in pairs; both
end with an assignment of all points, and the objective of both is computed by the same code. The processor's time is
what counts, since other programs share the machine. About 15 minutes. faiss is no dependency: where `import faiss`
fails, a line says so and only this package's k-means is measured.
Writes benchmarks/results/kmeans.json and .md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import operator
import os
import resource
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
HEADER = ["clusters", "iterations", "of", "CPU seconds", "of faiss' CPU time", "wall seconds", "mean squared distance"]
HEADER += ["peak beside the points, GB"]


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

    library.omp_set_num_threads(torch.get_num_threads())
    options = {"niter": iterations, "max_points_per_centroid": 10**9, "min_points_per_centroid": 1}
    found = library.Kmeans(points.shape[1], len(start), **options)
    found.train(points, init_centroids=start)
    found.index.search(points, 1)
    return np.asarray(found.centroids)


SYSTEMS = {"ours": ours, "faiss": faiss}


def run_one(system: str, path: Path, clusters: int, iterations: int, threads: int) -> dict[str, float]:
    """Seconds, objective and memory of one run, in this process."""
    torch.set_num_threads(threads)
    points = np.load(path)
    start = points[np.sort(np.random.default_rng(1).choice(len(points), clusters, replace=False))].copy()
    SYSTEMS[system](points[:clusters], start, 1)  # libraries are loaded
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun, worked = time.perf_counter(), time.process_time()
    centroids = SYSTEMS[system](points, start, iterations)
    found = {"cpu_s": time.process_time() - worked, "wall_s": time.perf_counter() - begun}
    found["peak_gb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e9
    every = torch.from_numpy(points[:: max(1, len(points) // 100_000)])
    nearest = torch.from_numpy(centroids)[nearest_centroids(every, torch.from_numpy(centroids))]
    return found | {"objective": float((every - nearest).double().square().sum(1).mean())}


def measure(systems: list[str], options: argparse.Namespace, path: Path) -> list[dict[str, Any]]:
    """One entry per run."""
    runs = []
    for clusters, iterations in zip(options.clusters, options.iterations, strict=True):
        for pair in range(options.pairs):
            for system in systems[:: 1 if pair % 2 == 0 else -1]:
                command = [sys.executable, "-m", "benchmarks.kmeans", "--one", system, str(path)]
                command += [str(clusters), str(iterations), str(options.threads)]
                environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
                result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                run = {"clusters": clusters, "iterations": iterations, "of": system, "pair": pair}
                runs.append(run | json.loads(result.stdout))
                print(runs[-1], flush=True)
    return runs


def rows(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Of the table: medians over the pairs."""
    found = []
    for clusters, iterations in dict.fromkeys((run["clusters"], run["iterations"]) for run in runs):
        own = [run for run in runs if run["clusters"] == clusters]
        for system in dict.fromkeys(run["of"] for run in own):
            its = [run for run in own if run["of"] == system]
            theirs = [run["cpu_s"] for run in own if run["of"] == "faiss"]
            cpu = [run["cpu_s"] for run in its]
            ratio = statistics.median(map(operator.truediv, cpu, theirs)) if theirs else None
            found.append(
                [
                    f"{clusters:,}",
                    str(iterations),
                    system,
                    f"{statistics.median(cpu):.1f}",
                    "-" if ratio is None else f"{ratio:.2f}",
                    f"{statistics.median(run['wall_s'] for run in its):.1f}",
                    f"{its[0]['objective']:.4f}",
                    f"{max(run['peak_gb'] for run in its):.2f}",
                ]
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--clusters", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--iterations", type=int, nargs="+", default=[10, 3], help="for each number of clusters")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "kmeans.md")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        system, path, *numbers = options.one
        print(json.dumps(run_one(system, Path(path), *map(int, numbers))))
        return
    systems = ["ours"]
    if importlib.util.find_spec("faiss"):
        systems.append("faiss")
    else:
        print("faiss is not installed (pip install faiss-cpu): ours alone is measured")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "points.npy"
        mixture(options.points, options.width, path)
        runs = measure(systems, options, path)
    date, machine = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}", hardware("cpu")
    lines = [
        "# k-means beside faiss",
        "",
        f"{date}, {machine}, {options.threads} thread{'s' * (options.threads > 1)} for each.",
        f"`python -m benchmarks.kmeans {' '.join(sys.argv[1:])}`".replace(" `", "`"),
        "",
        f"{options.points:,} vectors of {options.width} numbers, equal starts and iterations, and an assignment at the "
        f"end; medians of {options.pairs} runs in pairs. Wall time includes what else the machine did.",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
        *(f"| {' | '.join(row)} |" for row in rows(runs)),
        "",
    ]
    options.out.write_text("\n".join(lines))
    record = {"date": date, "hardware": machine, "points": options.points, "width": options.width, "runs": runs}
    options.out.with_suffix(".json").write_text(json.dumps(record | {"threads": options.threads}, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
