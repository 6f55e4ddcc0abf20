"""Rankings: figures by hand and by loops, equals in any order, no rank's part lost."""

from __future__ import annotations

from itertools import permutations
from math import log2
from statistics import fmean

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score
from torch import Tensor

from largescale.evaluate import rankings
from largescale.evaluate.rankings import ndcg, recall_of_partners
from tests.helpers.ranks import run_ranks


def directions(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees).double().deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_four_items_by_hand():
    """Of item 0, the order is 1, 2, 3, with relevances 0, 2, 1; of the others it is alike."""
    points, labels = directions(0, 10, 30, 90), torch.tensor([0, 1, 0, 2])
    relevance = torch.tensor([[2, 0, 1], [0, 2, 0], [1, 0, 2]])
    orders = {0: (0, 2, 1), 1: (0, 0, 0), 2: (0, 2, 1), 3: (1, 0, 1)}
    found = {}
    for query, gains in orders.items():
        best = sorted(gains, reverse=True)
        found[query] = (
            sum(g / log2(2 + p) for p, g in enumerate(gains)),
            sum(g / log2(2 + p) for p, g in enumerate(best)),
        )
    expected = fmean(dcg / ideal for dcg, ideal in found.values() if ideal)
    gain = ndcg(points, points, labels, relevance, 30)
    assert gain.value == pytest.approx(expected) and gain.num_queries == 3  # of class 1 there is no other item
    assert found[0][0] / found[0][1] == pytest.approx((2 / log2(3) + 1 / 2) / (2 + 1 / log2(3)))
    at_one = ndcg(points, points, labels, relevance, 1)
    assert at_one.value == pytest.approx((0 / 2 + 0 / 2 + 1 / 1) / 3)


def test_ndcg_is_scikit_learn_s_ties_included():
    generator = torch.Generator().manual_seed(0)
    points = torch.randint(-1, 2, (40, 2), generator=generator).double() + torch.tensor([0.1, 0.0])
    labels = torch.randint(4, (40,), generator=generator)
    relevance = torch.rand(4, 4, generator=generator).double()
    scores = -torch.cdist(points, points).square().mul(2**16).round().numpy()
    gains, others = relevance[labels][:, labels].numpy(), ~np.eye(40, dtype=bool)
    rows = scores[others].reshape(40, 39), gains[others].reshape(40, 39)
    for k in (1, 5, 30):
        expected = ndcg_score(rows[1], rows[0], k=k)
        assert ndcg(points, points, labels, relevance, k).value == pytest.approx(expected)


def test_equals_count_by_the_mean_over_their_orders():
    """Three candidates in one direction, the partner among them, behind one that is nearer."""
    candidates, queries = directions(5, 20, 20, 20, 90), directions(0, 0, 0, 0, 0)
    places = [order.index(1) for order in permutations((1, 2, 3))]
    for k in (1, 2, 3, 4, 5):
        of_equals = fmean(place + 1 < k for place in places)  # a place behind the nearest one
        expected = fmean([1.0, of_equals, of_equals, of_equals, float(k >= 5)])
        assert recall_of_partners(queries, candidates, [k]) == pytest.approx([expected])


@pytest.mark.parametrize("width", [3, 64])
def test_embeddings_that_are_all_the_same_get_what_chance_gives(width):
    one = torch.randn(1, width, generator=torch.Generator().manual_seed(1)).expand(101, -1)
    labels = torch.arange(101) % 3
    assert recall_of_partners(one, 2 * one, [1, 5, 10]) == pytest.approx([1 / 101, 5 / 101, 10 / 101])
    gain = ndcg(one, one, labels, torch.eye(3), 30)
    assert gain.value == pytest.approx(gain.chance) and 0.32 < gain.chance < 0.34
    assert gain.num_queries == 101


def measured() -> list[float]:
    generator = torch.Generator().manual_seed(2)
    queries, noise = (torch.randn(97, 8, generator=generator) for _ in range(2))
    labels = torch.randint(5, (97,), generator=generator)
    gain = ndcg(queries, queries + noise, labels, torch.eye(5), 30)
    return [*recall_of_partners(queries, queries + noise, [1, 5, 10]), gain.value, gain.chance, gain.num_queries]


def test_blocks_change_nothing_and_recall_is_that_of_a_loop(monkeypatch):
    whole = measured()
    monkeypatch.setattr(rankings, "_NUMBERS_AT_A_TIME", 97 * 10)
    assert measured() == pytest.approx(whole, rel=1e-12)
    generator = torch.Generator().manual_seed(2)
    queries, noise = (torch.randn(97, 8, generator=generator) for _ in range(2))
    first, second = queries.double(), (queries + noise).double()
    for place, k in enumerate((1, 5, 10)):
        hits = 0
        for row in range(97):
            far = [float((first[row] - other).norm()) for other in second]
            hits += sum(one < far[row] for one in far) < k
        assert whole[place] == pytest.approx(hits / 97)


@pytest.mark.distributed
def test_ranks_share_the_queries():
    alone = measured()
    for found in run_ranks(measured, 2):
        assert found == pytest.approx(alone, rel=1e-12)
