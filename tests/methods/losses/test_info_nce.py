from __future__ import annotations

import math

import pytest
import torch

from largescale.methods.losses import info_nce
from tests.methods.losses.cases import embeddings
from tests.methods.losses.loops import assert_same, info_nce_loop


@pytest.mark.parametrize("others", [None, torch.eye(5, dtype=torch.float64)], ids=["batch", "queue"])
def test_loss_and_gradient_equal_the_naive_loop(others):
    assert_same(
        lambda views: info_nce(*views, others, temperature=0.2),
        lambda views: info_nce_loop(*views, others, temperature=0.2),
        embeddings(),
    )


def test_several_views_pick_the_same_keys():
    queries, keys = embeddings(), embeddings()[0].flip(1)
    together = info_nce(queries.flatten(0, 1), keys)
    torch.testing.assert_close(together, (info_nce(queries[0], keys) + info_nce(queries[1], keys)) / 2)


@pytest.mark.parametrize("others, candidates", [(None, 6), (torch.ones(18, 5), 19)], ids=["batch", "queue"])
def test_equal_embeddings_cost_as_much_as_a_guess(others, candidates):
    assert float(info_nce(torch.ones(6, 5), torch.ones(6, 5), others)) == pytest.approx(math.log(candidates))


def test_a_perfect_match_against_orthogonal_others_has_the_closed_form():
    rows = torch.eye(5, dtype=torch.float64)
    expected = math.log(1 + 4 * math.exp(-1 / 0.5))
    assert float(info_nce(rows, rows, temperature=0.5)) == pytest.approx(expected, rel=1e-12)


def test_small_temperatures_do_not_overflow():
    views = embeddings().float()
    for others in (None, torch.eye(5)):
        assert info_nce(*views, others, temperature=0.001).isfinite()


@pytest.mark.parametrize("queries, keys", [((6, 5), (4, 5)), ((3, 5), (6, 5)), ((6, 4), (6, 5)), ((6, 5), (5,))])
@pytest.mark.parametrize("others", [None, torch.eye(5)], ids=["batch", "queue"])
def test_queries_of_other_images_are_refused(queries, keys, others):
    with pytest.raises(ValueError, match=r"expected \[V \* B, D\] and \[B, D\]"):
        info_nce(torch.ones(queries), torch.ones(keys), others)
