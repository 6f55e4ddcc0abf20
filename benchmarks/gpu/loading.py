"""The stream from JPEGs to views on the device, alone and under a real run: who waits for whom."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import images
import torch
from gpu.facts import synchronize
from gpu.harness import Context, Report
from gpu.runs import pretrain, run_python
from gpu.strategies import recipe

from largescale.data.stream import Stream
from largescale.parallel import auto_precision, precision
from largescale.processes import process_group

_COPIES = 8
"""Keys that share a photograph: making one takes longer than everything that is done with it."""


def compare(report: Report, context: Context) -> None:
    """Make shards; read them; train on them."""
    cores = len(os.sched_getaffinity(0))
    shards = _shards(report, context, cores)
    options = _options(context, shards)
    with process_group() as device:
        rate, processes = _stream_alone(context, options, device)
    report.row(
        "the stream alone, views on the device",
        images_per_s=rate,
        images_per_s_and_core=rate / cores,
        loaders=processes,
    )
    _run(report, context, options)


def _shards(report: Report, context: Context, cores: int) -> Path:
    """Photographs with all cores, and their shards."""
    started, count = time.perf_counter(), 6 if context.small else 16 * cores
    folder, shards = Path(context.folder) / "photographs", Path(context.folder) / "photograph-shards"
    folder.mkdir()
    make = partial(images.photograph, scale=0.4 if context.small else 1.0)
    with ProcessPoolExecutor(cores, multiprocessing.get_context("fork")) as pool:
        stored = list(pool.map(make, range(count)))
    for number, payload in enumerate(stored * _COPIES):
        (folder / f"{number:06d}.jpg").write_bytes(payload)
    run_python(["-m", "shards", "convert", str(folder), str(shards), "--shuffle", "0"], check=True)
    report.row(
        f"{count} photographs of {sum(map(len, stored)) / count / 1000:.0f} KB, {_COPIES} keys each, made",
        seconds=time.perf_counter() - started,
    )
    return shards


def _options(context: Context, shards: Path) -> list[str]:
    network = (
        ["model={backbone: resnet, stem: 3x3s2, depths: [1, 1], width: 8}", "method={hidden: [32], prototypes: 50}"]
        if context.small
        else ["model.backbone=resnet50"]
    )
    crops = "[{num: 2, size: 32}, {num: 2, size: 16}]" if context.small else "[{num: 2, size: 224}, {num: 6, size: 96}]"
    batch = 8 if context.small else 256
    return [
        *network,
        f"data.crops={crops}",
        f"data.shards={shards}",
        f"train.global_batch={batch}",
        f"train.steps={_steps(context)}",
        "optim.lr=0.3",
        "data.streams=8",
    ]


def _steps(context: Context) -> int:
    return 6 if context.small else 40


def _stream_alone(context: Context, options: list[str], device: torch.device) -> tuple[float, str]:
    """Images per second, the augmentation included, after some batches to warm up."""
    config = auto_precision.of_device(recipe(options), device)
    stream = Stream(config, rank=0, world_size=1, device=device, dtype=precision.views_dtype(config))
    # The loaders work ahead while the augmentation is compiled; what they had made by then must not count.
    warm_up, count = config.data.prefetch + 2, 6 if context.small else 24
    with closing(stream(range(warm_up + count))) as batches:
        for number, _ in enumerate(batches, 1):
            if number == warm_up:
                synchronize(device)
                started = time.perf_counter()
        synchronize(device)
    rate = count * config.train.global_batch / (time.perf_counter() - started)
    return rate, f"{stream.counts[0]} x {stream.counts[1]} threads"


def _run(report: Report, context: Context, options: list[str]) -> None:
    """The command itself; what it logs after its first steps."""
    run, every = Path(context.folder) / "loading", _steps(context) // 2
    result = pretrain(context, [*options, f"run.dir={run}", f"run.log_every={every}"])
    if result.returncode:
        raise RuntimeError(f"exit code {result.returncode}: {result.stderr.strip().splitlines()[-1]}")
    row = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    report.row(
        f"a run, steps {every} to {2 * every}",
        images_per_s=row["images_per_s"],
        step_ms=1000 * row["step_s"],
        waits_for_data_ms=1000 * row["data_wait_s"],
        share_waited=f"{row['data_wait_s'] / row['step_s']:.1%}",
        decode_ms_an_image=row["decode_ms"],
        ready_batches=row["queue_depth"],
        peak_GB=row["peak_memory_bytes"] / 1e9,
    )
