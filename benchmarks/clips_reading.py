"""What reading clips costs beside images of the same bytes: a part of benchmarks/clips.py."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from largescale.config import load_config
from largescale.data.batches import BatchMaker, Buffers
from largescale.data.corpora import open_corpora
from largescale.data.order import Mixture
from largescale.data.reader import ShardReader
from shards.clips.clip import ClipSettings
from shards.conversion.convert import Options, convert

RECIPES = Path(__file__).resolve().parent.parent / "configs" / "small"
BATCH, BATCHES = 32, 8
ROWS = {
    "an image": ("rotation", 1, "images"),
    "a frame of a clip": ("rotation", 1, "clips"),
    "four frames of a clip": ("opn", 4, "clips"),
    "a frame of a clip, and a second of its sound": ("avc", 1, "clips"),
}
"""Recipe, views of a sample, and what is read, by what a sample is."""


class CountingReader(ShardReader):
    """Adds up the bytes that are read."""

    num_bytes = 0

    def _member(self, *arguments: Any) -> Any:
        found = super()._member(*arguments)
        self.num_bytes += len(found[0])
        return found


class Batches:
    """Batches of samples with views of 112 px, as a loader process makes them.

    Args:
        recipe: of configs/small.
        num: views of a sample.
        shards: what is read.
    """

    def __init__(self, recipe: str, num: int, shards: Path) -> None:
        crops = f"data.crops=[{{num: {num}, size: 112, scale: [0.3, 1.0]}}]"
        words = [f"data.shards={shards}", "data.eval_shards=", crops, f"train.global_batch={BATCH}"]
        if recipe == "avc":
            words += ["method.sound.seconds=1", "method.sound.rate=48000"]
        config = load_config(RECIPES / f"{recipe}.yaml", words)
        corpora, data, sound = open_corpora(config.data), config.data, config.method.sounds()
        streams = {"streams": data.streams, "shuffle_window": data.shuffle_window}
        order = Mixture([corpora[0].shard_sizes()], [1.0], seed=0, global_batch=BATCH, **streams)
        self.reader = CountingReader(corpora)
        self._maker = BatchMaker(self.reader, order, config, rank=0, world_size=1)
        asked = data, BATCH, self._maker.facts, sound
        self._buffers = Buffers.carve(torch.empty(Buffers.num_bytes(*asked), dtype=torch.uint8), *asked)
        self._step = 0

    def make(self) -> None:
        """Read, verify, decode and cut some."""
        for _ in range(BATCHES):
            part = self._maker.make(self._step, slice(None), self._buffers, None)
            assert not part.error and not part.bug and not part.skipped, part
            self._step += 1


def measure_reading(videos: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """CPU milliseconds per megabyte, of what is read of clips and of images that are the same JPEGs; in turns."""
    clips = replace(ClipSettings(), frame_side=180, clip_seconds=5)
    convert(videos, folder / "clips", Options("clips", clips=clips))
    reader, images = ShardReader(open_corpora(_data(folder / "clips"))), folder / "frames"
    images.mkdir()
    for sample in range(len(reader)):
        facts = reader.clip(sample)
        assert facts is not None
        for place in range(len(facts.times)):
            payload = reader.read(sample, lambda _, place=place: place).payload
            (images / f"{sample:04d}-{place:03d}.jpg").write_bytes(payload)
    convert(images, folder / "images", Options("images"))
    ways = {name: Batches(recipe, num, folder / what) for name, (recipe, num, what) in ROWS.items()}
    found: dict[str, dict[str, list[float]]] = {name: {"ms_per_mb": [], "kb": []} for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            way.reader.num_bytes, started = 0, time.process_time()
            way.make()
            if number:  # the first one warms up
                spent = time.process_time() - started
                found[name]["ms_per_mb"].append(1e9 * spent / way.reader.num_bytes)
                found[name]["kb"].append(way.reader.num_bytes / BATCHES / BATCH / 1e3)
    base = found["an image"]["ms_per_mb"]
    return {
        name: {
            "kb": statistics.mean(row["kb"]),
            "ms_per_mb": statistics.median(row["ms_per_mb"]),
            "ratio": statistics.median(a / b for a, b in zip(row["ms_per_mb"], base, strict=True)),
        }
        for name, row in found.items()
    }


def _data(shards: Path) -> Any:
    return load_config(RECIPES / "base.yaml", [f"data.shards={shards}"]).data


def reading_table(found: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    lines = [
        "",
        "Reading in training: a loader process reads, verifies and decodes what a sample shows, and cuts views of "
        "112 px; CPU time per megabyte that is read. Images are the same JPEGs, of 180 px, each by itself.",
        "",
        "| a sample | kB per sample | ms per MB | beside images |",
        "|---|---|---|---|",
    ]
    for name, row in found.items():
        lines.append(f"| {name} | {row['kb']:.0f} | {row['ms_per_mb']:.1f} | {row['ratio']:.2f} |")
    return lines
