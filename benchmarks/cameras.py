"""Photographs of 12 megapixels through the stream: bare, with an EXIF block, and turned by one. Part of stream.py."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from images import dead_leaves
from PIL import Image

from largescale.config import Config, DataConfig, TrainConfig
from largescale.data.batches import BatchMaker, Buffers
from largescale.data.corpora import open_corpora
from largescale.data.order import Mixture
from largescale.data.reader import ShardReader
from shards.cleaning.rules import Cleaning
from shards.conversion.convert import Options, convert

KINDS = {"bare": None, "with EXIF": 1, "turned by EXIF": 6}
"""The orientation that each has."""

_PHOTOGRAPHS = _BATCH = 8


def measure_cameras(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of CPU time an image, for each kind a list of `rounds`, taking turns; the pixels are the same."""
    makers = {
        kind: _maker(folder / f"camera-{number}", orientation)
        for number, (kind, orientation) in enumerate(KINDS.items())
    }
    spent: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds + 1):
        for kind, make in makers.items():
            started = time.process_time()
            make(number)
            if number > 0:  # the first warms up
                spent[kind].append(1000 * (time.process_time() - started) / _BATCH)
    return spent


def camera_table(spent: dict[str, list[float]]) -> str:
    """As Markdown; ratios are medians of the rounds'."""
    lines = ["| photographs of 12 megapixels | ms/image | times bare |", "|---|---|---|"]
    for kind, own in spent.items():
        times = statistics.median(a / b for a, b in zip(own, spent["bare"], strict=True))
        lines.append(f"| {kind} | {statistics.median(own):.1f} | {times:.2f} |")
    return "\n".join(lines)


def _maker(folder: Path, orientation: int | None) -> Callable[[int], None]:
    source, shards = folder / "pile", folder / "shards"
    source.mkdir(parents=True)
    for number in range(_PHOTOGRAPHS):
        leaves = dead_leaves(750, 1000, np.random.default_rng(number))
        image, exif = Image.fromarray(leaves).resize((4000, 3000), Image.Resampling.BICUBIC), Image.Exif()
        if orientation:
            exif[0x0112], exif[0x010F] = orientation, "A camera"
        stored = io.BytesIO()
        image.save(stored, "JPEG", quality=90, exif=exif)
        (source / f"{number}.jpg").write_bytes(stored.getvalue())
    convert(source, shards, Options("camera", cleaning=Cleaning(decode=False)))
    config = Config(
        name="cameras", data=DataConfig(shards=str(shards), streams=1), train=TrainConfig(global_batch=_BATCH)
    )
    corpora = open_corpora(config.data)
    order = Mixture(
        [corpora[0].shard_sizes()],
        [1.0],
        seed=0,
        global_batch=_BATCH,
        streams=1,
        shuffle_window=config.data.shuffle_window,
    )
    maker = BatchMaker(ShardReader(corpora), order, config, rank=0, world_size=1)
    memory = torch.empty(Buffers.num_bytes(config.data, _BATCH), dtype=torch.uint8)
    buffers = Buffers.carve(memory, config.data, _BATCH)

    def make(step: int) -> None:
        part = maker.make(step, slice(None), buffers, None)
        assert not part.error and not part.skipped, part

    return make
