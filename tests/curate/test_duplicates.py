"""Deduplication against a loop over pairs, and on planted copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from largescale.curate import duplicates
from largescale.curate.duplicates import find_duplicates


def loop(rows: np.ndarray, centroid: np.ndarray, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """One image at a time, in float64."""
    order = np.lexsort((np.arange(len(rows)), rows @ centroid))
    kept: list[int] = []
    for place in order:
        if all(rows[place] @ rows[other] < 1 - epsilon for other in kept):
            kept.append(place)
    of = np.full(len(rows), -1)
    for place in set(range(len(rows))) - set(kept):
        of[place] = max(kept, key=lambda other: rows[place] @ rows[other])
    return of, np.array([rows[place] @ rows[other] if other >= 0 else 0 for place, other in enumerate(of)])


def turned(angles: list[float]) -> Tensor:
    """Vectors in a plane at these angles in degrees."""
    radians = torch.tensor(angles).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], 1)


def test_planted_turns_of_a_vector():
    """Three turns of 5 degrees: 1 - cos 5 is 0.0038, 1 - cos 10 is 0.0152. The farthest from the centroid is kept."""
    rows, centroid = turned([90, 0, 5, 10]), turned([-20])[0]
    found = find_duplicates(rows, centroid, 0.005)
    assert found.of.tolist() == [-1, -1, 3, -1], "10 is kept, it drops 5, so that 0 is not dropped for the sake of 5"
    assert found.cosines[2] == pytest.approx(np.cos(np.deg2rad(5)), abs=1e-6)
    assert find_duplicates(rows, centroid, 0.02).of.tolist() == [-1, 3, 3, -1]
    assert find_duplicates(rows, centroid, 0.003).of.tolist() == [-1] * 4


def test_of_exact_copies_the_smallest_number_is_kept():
    row = normalize(torch.randn(1, 16, generator=torch.Generator().manual_seed(0)))
    found = find_duplicates(row.repeat(5, 1), row[0], 1e-4)
    assert found.of.tolist() == [-1, 0, 0, 0, 0]


@pytest.mark.parametrize("block, columns", [(1024, 8192), (7, 5), (1, 1)])
@pytest.mark.parametrize("epsilon", [0.001, 0.02, 0.2])
def test_blocks_give_what_a_loop_over_pairs_gives(monkeypatch, block, columns, epsilon):
    monkeypatch.setattr(duplicates, "_BLOCK", block)
    monkeypatch.setattr(duplicates, "_COLUMNS", columns)
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(40, 8, generator=generator)
    rows = normalize(base.repeat(5, 1) + 0.1 * torch.randn(200, 8, generator=generator))
    centroid = normalize(rows.sum(0), dim=0)
    of, cosines = loop(rows.double().numpy(), centroid.double().numpy(), epsilon)
    found = find_duplicates(rows, centroid, epsilon)
    assert found.of.tolist() == of.tolist()
    np.testing.assert_allclose(found.cosines, cosines, atol=1e-6)
    assert epsilon < 0.02 or 0 < (of >= 0).sum() < 190


def test_a_cluster_of_one_or_none():
    assert find_duplicates(torch.eye(3)[:1], torch.eye(3)[0], 0.1).of.tolist() == [-1]
    assert find_duplicates(torch.empty(0, 3), torch.eye(3)[0], 0.1).of.tolist() == []
