"""Agreement of clusterings against scikit-learn and a loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from largescale.clustering import agreement as module
from largescale.clustering.agreement import Agreement, agreement
from tests.helpers.ranks import Counted, run_ranks

COUNT = 400


def labels(missing: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    first = torch.randint(6, (COUNT,), generator=generator)
    second = torch.where(torch.rand(COUNT, generator=generator) < 0.6, 8 - first, first % 3)
    if missing:
        first[:5], second[3:9] = -1, -1
    return first, second


@pytest.mark.parametrize("missing", [False, True])
def test_it_is_that_of_scikit_learn(missing):
    first, second = labels(missing)
    found = agreement(first, second, 7, 9)
    assert found is not None
    both = ((first >= 0) & (second >= 0)).numpy()
    a, b = first.numpy()[both], second.numpy()[both]
    assert found.nmi == pytest.approx(normalized_mutual_info_score(a, b), rel=1e-9)
    kept = sum(np.bincount(b[a == one]).max() for one in np.unique(a)) / len(a)
    assert found.kept == pytest.approx(kept)


def test_the_numbers_of_clusters_do_not_matter():
    first, _ = labels(False)
    assert agreement(first, 5 - first, 6, 6) == pytest.approx((1, 1))
    assert agreement(first, torch.full_like(first, -1), 6, 6) is None
    one = torch.zeros(4, dtype=torch.int64)
    assert agreement(one, one, 3, 3) == (1, 1)


def in_pieces() -> Any:
    module._BLOCK = 150  # three rows of the table at a time
    own = slice(0, 150) if dist.get_rank() == 0 else slice(150, COUNT)
    first, second = labels(True)
    return agreement(first[own], second[own], 7, 9)


def test_thousands_of_clusters_need_no_table_of_all_pairs():
    pairs, of = 1000, 100_000  # the table would take 80 GB
    first = torch.arange(pairs) * (of // pairs)
    with Counted() as counted:
        beats: list[str] = []
        assert agreement(first, of - 1 - first, of, of, beats.append) == pytest.approx((1, 1))
    assert len(beats) == 1 and not counted.calls


@pytest.mark.distributed
def test_ranks_find_what_one_finds(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 150)
    first, second = labels(True)
    whole = agreement(first, second, 7, 9)
    for found in run_ranks(in_pieces, 2):
        assert isinstance(found, Agreement) and found == whole
