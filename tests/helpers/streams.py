"""Streams of tests/tiny.yaml over a folder of shards, and damage to what they read."""

from __future__ import annotations

from pathlib import Path

import torch

from largescale.config import Config, load_config
from largescale.data.corpora import Corpus
from largescale.data.reader import ShardReader
from largescale.data.stream import Stream
from shards.format.manifest import read_manifest
from tests.helpers.commands import TINY


def make_stream(folder: Path, *overrides: str, rank: int = 0, ranks: int = 1) -> Stream:
    """Of one rank, in float64 on the CPU."""
    config: Config = load_config(TINY, [f"data.shards={folder}", *overrides])
    return Stream(config, rank=rank, world_size=ranks, device=torch.device("cpu"), dtype=torch.float64)


def overwrite(folder: Path, shard: int, row: int) -> str:
    """Overwrite the bytes of one image in its tar; returns its key."""
    reader = ShardReader([Corpus(read_manifest(folder))])
    index = reader._shard(shard)[1]
    with reader.corpora[0].manifest.tar_path(shard).open("r+b") as file:
        file.seek(int(index.offset[row]) + 20)
        file.write(b"\xff" * 40)
    return index.key(row)
