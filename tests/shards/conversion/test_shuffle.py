"""The order of a shuffled listing: complete, determined by its seed, and as random in many buckets as in one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shards.conversion import shuffle
from tests.helpers.commands import IN_MEMORY


@pytest.fixture
def in_memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        yield Path(folder)


def shuffled(folder: Path, count: int, seed: int | list[int]) -> np.ndarray:
    numbers = folder / str(count)
    if not numbers.exists():
        np.arange(count, dtype=np.uint64).tofile(numbers)
    with (folder / "out").open("wb") as out:
        shuffle.append_shuffled(numbers, out, seed, folder / "work")
    assert not (folder / "work").exists()
    return np.fromfile(folder / "out", np.uint64)


@pytest.mark.parametrize("count", [0, 1, 64, 65, 1000])
def test_every_number_is_there_once(tmp_path, monkeypatch, count):
    monkeypatch.setattr(shuffle, "BUCKET", 64)
    order = shuffled(tmp_path, count, seed=3)
    assert sorted(order.tolist()) == list(range(count))
    assert np.array_equal(order, shuffled(tmp_path, count, seed=3))
    assert count < 3 or not np.array_equal(order, shuffled(tmp_path, count, seed=4))


@pytest.mark.parametrize("bucket", [4, 64])
def test_every_order_is_equally_likely(in_memory, monkeypatch, bucket):
    monkeypatch.setattr(shuffle, "BUCKET", bucket)
    runs = 3000
    places = np.zeros((12, 12))  # which number comes where
    followed = 0
    for seed in range(runs):
        order = shuffled(in_memory, 12, seed).astype(int)
        places[order, np.arange(12)] += 1
        followed += (np.diff(order) == 1).sum()
    expected = runs / 12
    chi_squared = ((places - expected) ** 2 / expected).sum()
    assert chi_squared < 121 + 5 * (2 * 121) ** 0.5  # 11 x 11 degrees of freedom, five standard deviations
    assert abs(followed / runs - 11 / 12) < 0.1  # of 11 neighbours one in 12 is the next number
