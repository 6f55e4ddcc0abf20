"""Streams at full speed for a while and watches its memory: all processes of a rank, their own bytes.

    python benchmarks/soak.py [--minutes 30] [--workers 1]

2 x 224 + 6 x 96 views of generated JPEGs of about 104 KB, over many epochs. Writes benchmarks/results/soak.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from images import write_photographs
from tqdm import tqdm

from largescale.config import Config, DataConfig, TrainConfig
from largescale.data.stream import Stream
from largescale.run.environment import environment
from shards.conversion.convert import Options, convert

RESULTS = Path(__file__).resolve().parent / "results"
EVERY_S = 10.0
"""Seconds between two looks at the memory."""


def own_bytes() -> int:
    """Bytes of memory that belong to this process and its children alone."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    total = 0
    for pid in [os.getpid(), *map(int, children)]:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Dirty", "Private_Clean")):
                total += 1024 * int(line.split()[1])
    return total


def thirds(sizes: list[int]) -> dict[str, float]:
    """Medians of the first, second and last third: flat memory has equal ones, whatever single looks show."""
    parts = np.array_split(np.asarray(sizes), 3)
    return {
        f"bytes_{name}_third": float(np.median(part))
        for name, part in zip(("first", "second", "last"), parts, strict=True)
    }


def main() -> None:
    """Stream for the given minutes, look at the memory every `EVERY_S`, and write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--images", type=int, default=640)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        photographs, shards = Path(folder) / "photographs", Path(folder) / "shards"
        write_photographs(photographs, arguments.images)
        convert(photographs, shards, Options("soak", samples_per_shard=64, shuffle=0))
        data = DataConfig(shards=str(shards), workers=arguments.workers, threads=1)
        config = Config(name="soak", data=data, train=TrainConfig(global_batch=64, steps=10**9))
        stream = Stream(config, rank=0, world_size=1, device=torch.device("cpu"), dtype=torch.float32)
        # The loaders are what is watched.
        stream.loaded.augments = [lambda views, draws: views for _ in stream.loaded.augments]
        sizes, images = [], 0
        started = looked = time.monotonic()
        batches = stream(range(10**9))
        bar = tqdm(total=round(arguments.minutes * 60), unit="s", desc="soak")
        for batch in batches:
            images += len(batch.ids)
            now = time.monotonic()
            if now - looked >= EVERY_S:
                bar.update(round(now - looked))
                looked = now
                sizes.append(own_bytes())
            if now - started >= 60 * arguments.minutes:
                break
        seconds = time.monotonic() - started
        batches.close()
        bar.close()
    machine = environment()
    machine.pop("command")
    result = {
        "minutes": seconds / 60,
        "images": images,
        "images_per_s": images / seconds,
        "workers": arguments.workers,
        "epochs": images / arguments.images,
        **thirds(sizes),
        "bytes": sizes,
        "environment": machine,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{images:,} images in {seconds / 60:.1f} minutes, {images / seconds:.0f} a second; median memory "
        f"{result['bytes_first_third'] / 1e6:.1f} MB in the first third, "
        f"{result['bytes_last_third'] / 1e6:.1f} MB in the last"
    )


if __name__ == "__main__":
    main()
