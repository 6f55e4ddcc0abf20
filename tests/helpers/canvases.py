"""A small set of scenes with several labels, masks and boxes."""

from __future__ import annotations

from pathlib import Path

from benchmarks import canvases


def scenes(folder: Path, num_train: int = 160, num_test: int = 60) -> tuple[Path, Path]:
    """Shard folders of training and test scenes."""
    return canvases.write(folder, "train", num_train, 0, 40), canvases.write(folder, "test", num_test, 0, 20)
