from __future__ import annotations

from functools import partial

import pytest
import torch

from largescale.methods.losses import cross_correlation
from tests.methods.losses.cases import embeddings
from tests.methods.losses.loops import assert_same, cross_correlation_loop


@pytest.mark.parametrize("off_diagonal", [0.0, 0.0051, 1.0])
def test_loss_and_gradient_equal_the_naive_loop(off_diagonal):
    ours = partial(cross_correlation, off_diagonal=off_diagonal)
    assert_same(lambda z: ours(*z), partial(cross_correlation_loop, off_diagonal=off_diagonal), embeddings())


def test_equal_views_with_uncorrelated_dimensions_cost_nothing():
    signs = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    assert float(cross_correlation(signs, signs)) == pytest.approx(0, abs=1e-9)
    # A dimension that repeats another one costs two entries off the diagonal.
    repeated = signs[:, [0, 1, 1]]
    assert float(cross_correlation(repeated, repeated, off_diagonal=0.1)) == pytest.approx(0.2, rel=1e-4)


def test_invariances():
    """Neither the order of views or images matters, nor scale and shift of a dimension, but for what keeps from 0/0."""
    views = 100 * embeddings()
    scaled = views * torch.linspace(1, 3, views.shape[-1], dtype=torch.float64) + 7
    for other in (views.flip(0), views.flip(1), scaled):
        torch.testing.assert_close(cross_correlation(*other), cross_correlation(*views), rtol=1e-7, atol=0)


def test_standardising_each_ranks_part_by_itself_would_be_another_loss():
    """As some public code does; that ours is the loss of the whole batch on several ranks is in test_over_ranks."""
    views = embeddings()
    parts = [((z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True, correction=0)) for z in views.chunk(2, dim=1)]
    apart = torch.cat(parts, dim=1)
    correlations = apart[0].T @ apart[1] / views.shape[1]
    off = correlations.square().sum() - correlations.diagonal().square().sum()
    loss = (1 - correlations.diagonal()).square().sum() + 0.0051 * off
    assert abs(float(loss) / float(cross_correlation(*views)) - 1) > 0.01


def test_equal_rows_have_a_finite_gradient():
    views = torch.ones(2, 4, 3, requires_grad=True)
    cross_correlation(*views).backward()
    assert views.grad.isfinite().all()


def test_half_precision_is_correlated_in_float32():
    views = embeddings().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_correlation(*views)
    torch.testing.assert_close(loss, cross_correlation(*views.float()), rtol=0, atol=0)
