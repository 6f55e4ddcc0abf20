"""Feature extraction against the forward pass alone: how much of the network's own speed is left.

    python benchmarks/features.py [--images 192] [--pairs 5] [--ranks 2] [--backbone resnet50]

JPEGs of about 104 KB (benchmarks/images.py) in shards; a network with random weights at 224 px. In every pair
batches of the same sizes go through the network twice: random numbers, and images that the code of `largescale
features` reads, decodes and crops, with the loader processes it chooses by itself. The ratio is that of a pair, so what
disturbs the machine meets both alike. With several ranks, each has one thread and its share of the images, all at the
same time.
Writes benchmarks/results/features.json and features.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import write_photographs

from largescale.config import Config, load_config
from largescale.data.corpora import open_corpus
from largescale.evaluate.extract import blocks, features_of, load_method
from largescale.run.environment import environment
from shards.cli import main as shards

RESULTS = Path(__file__).resolve().parent / "results"
BATCH = 16


def settings(folder: str, backbone: str) -> Config:
    """A network, and how images are read."""
    recipe = Path(__file__).resolve().parents[1] / "configs" / "swav" / "resnet50_100ep.yaml"
    return load_config(recipe, [f"data.shards={folder}", f"model.backbone={backbone}", f"evaluate.batch={BATCH}"])


@torch.no_grad()
def measure(folder: str, backbone: str, rank: int, ranks: int, pairs: int, barrier: Any, results: Any) -> None:
    """Seconds of one rank for its share of the images, [forward alone, extraction], once per pair."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    config = settings(folder, backbone)
    corpus, method = open_corpus(folder, config.data), load_method(config, None).to(device)
    batches = blocks(np.arange(corpus.manifest.num_samples), BATCH)[rank::ranks]
    noise = torch.rand(BATCH, 3, 224, 224, device=device).contiguous(memory_format=torch.channels_last)
    method.encode(noise)
    for _ in range(pairs):
        barrier.wait()
        started = time.perf_counter()
        for batch in batches:
            method.encode(noise[: len(batch)]).cpu()
        between = time.perf_counter()
        barrier.wait()
        again = time.perf_counter()
        with closing(features_of([corpus], config, {"features": method.encode}, batches, device)) as source:
            num = sum(len(found.crops.ids) for found in source)
        results.put((rank, num, between - started, time.perf_counter() - again))


def speeds(folder: str, backbone: str, ranks: int, pairs: int) -> dict[str, Any]:
    """Images per second of all ranks together, forward alone and extraction, and the ratio of each pair."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(ranks), context.Queue()
    processes = [
        context.Process(target=measure, args=(folder, backbone, rank, ranks, pairs, barrier, results))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    rows = [results.get(timeout=3600) for _ in range(ranks * pairs)]
    for process in processes:
        process.join()
    by_rank = [[row for row in rows if row[0] == rank] for rank in range(ranks)]
    found = []
    for pair in zip(*by_rank, strict=True):
        num = sum(row[1] for row in pair)
        found.append((num / max(row[2] for row in pair), num / max(row[3] for row in pair)))
    return {
        "ranks": ranks,
        "forward": statistics.median(one for one, _ in found),
        "extraction": statistics.median(one for _, one in found),
        "ratios": sorted(both / alone for alone, both in found),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The result for people."""
    lines = ["| ranks | forward alone, images/s | extraction, images/s | ratio: median (range) |", "|---|---|---|---|"]
    for row in rows:
        ratios = row["ratios"]
        lines.append(
            f"| {row['ranks']} | {row['forward']:.1f} | {row['extraction']:.1f} | "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--backbone", default="resnet50")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder) / "images", arguments.images)
        assert shards(["convert", f"{folder}/images", f"{folder}/shards", "--samples-per-shard", "64"]) == 0
        rows = [
            speeds(f"{folder}/shards", arguments.backbone, ranks, arguments.pairs)
            for ranks in range(1, arguments.ranks + 1)
        ]
    text = table(rows)
    print(text)
    machine = environment()
    machine.pop("command")
    about = {"date": time.strftime("%Y-%m-%d"), "images": arguments.images, "environment": machine}
    (RESULTS / "features.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    (RESULTS / "features.md").write_text(
        f"# Feature extraction against the forward pass alone\n\n{time.strftime('%Y-%m-%d')}, {arguments.backbone}, "
        f"224 px, float32, {arguments.images} JPEGs of about 104 KB, {arguments.pairs} pairs, one thread per rank;\n"
        f"`python benchmarks/features.py --images {arguments.images} --pairs {arguments.pairs}`; the machine is in "
        f"features.json.\n\n{text}\n"
    )


if __name__ == "__main__":
    main()
