"""The shuffle of embeddings by coarse cluster: this project's own beside DuckDB's.

    pip install duckdb
    OMP_NUM_THREADS=1 python -m benchmarks.shuffle [--images 1000000] [--width 128] [--coarse 1000]

Both get embeddings in files as `largescale features` writes them, and a cluster of every image drawn at random, so that
finding clusters is no part of it. Ours is what `largescale curate` does: groups of files are sorted in memory and
written, and a cluster is read from its place in each of them. DuckDB joins the files with the clusters, and writes one
Parquet file sorted by cluster. Last, all rows are read once, a hundred clusters at a time. One thread each; seconds are
those of the processor.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.curate import write_pile
from benchmarks.gram import hardware
from largescale.curate import buckets
from largescale.curate.buckets import Buckets, sort_rows
from largescale.curate.embeddings import read_embeddings
from largescale.curate.workshop import workshop

AT_A_TIME = 100


def ours(features: Path, work: Path, clusters: np.ndarray, count: int) -> dict[str, float]:
    """Sort, and read all."""
    embeddings, done = read_embeddings(features), 0

    def known(rows: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        nonlocal done
        done += len(rows)
        return torch.from_numpy(clusters[done - len(rows) : done])

    buckets.nearest_centroids = known
    with workshop(work, {"version": 0}) as place:
        begun = time.process_time()
        made = sort_rows(place, embeddings, torch.zeros(count, embeddings.width))
        seconds = {"shuffle": time.process_time() - begun}
        assert isinstance(made, Buckets)
        begun = time.process_time()
        rows = sum(len(made.rows(bucket, torch.device("cpu"))) for bucket in range(count))
        assert rows == len(clusters)
        return seconds | {"read": time.process_time() - begun}


def theirs(features: Path, work: Path, clusters: np.ndarray, count: int, memory_gb: float) -> dict[str, float]:
    """The same by SQL."""
    work.mkdir()
    pq.write_table(pa.table({"sample": np.arange(len(clusters)), "cluster": clusters}), work / "clusters.parquet")
    settings = {"threads": 1, "memory_limit": f"{memory_gb}GB", "temp_directory": str(work / "spill")}
    base = duckdb.connect(config=settings)
    begun = time.process_time()
    base.execute(
        f"""COPY (SELECT c.cluster, c.sample, f.embedding FROM (SELECT embedding, CAST(key AS BIGINT) AS sample
        FROM read_parquet('{features}/*.parquet')) f JOIN read_parquet('{work}/clusters.parquet') c USING (sample)
        ORDER BY c.cluster, c.sample) TO '{work}/sorted.parquet' (FORMAT parquet)"""
    )
    seconds = {"shuffle": time.process_time() - begun}
    begun, rows = time.process_time(), 0
    for first in range(0, count, AT_A_TIME):
        those = f"cluster BETWEEN {first} AND {first + AT_A_TIME - 1}"
        query = f"SELECT * FROM read_parquet('{work}/sorted.parquet') WHERE {those}"
        rows += len(base.execute(query).to_arrow_table())
    assert rows == len(clusters)
    return seconds | {"read": time.process_time() - begun}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--coarse", type=int, default=1000)
    parser.add_argument("--memory-gb", type=float, default=2.0, help="that DuckDB may use")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clusters = np.random.default_rng(0).integers(0, options.coarse, options.images)
    print(f"{hardware('cpu')}; {options.images:,} images of {options.width}, {options.coarse:,} clusters")
    with tempfile.TemporaryDirectory() as folder:
        features = Path(folder) / "features"
        write_pile(features, options.images, options.width)
        print("ours  ", ours(features, Path(folder) / "ours", clusters, options.coarse), _peak(), flush=True)
        found = theirs(features, Path(folder) / "theirs", clusters, options.coarse, options.memory_gb)
        print("DuckDB", found, _peak(), flush=True)


def _peak() -> str:
    return f"peak so far {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
