from __future__ import annotations

from functools import partial

import pytest
import torch

from largescale.methods.losses import variance_covariance
from largescale.methods.losses.variance_covariance import variance_covariance_terms
from tests.methods.losses.cases import embeddings
from tests.methods.losses.loops import assert_same, variance_covariance_loop

WEIGHTS = [(25.0, 25.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_loss_and_gradient_equal_the_naive_loop(weights):
    named = dict(zip(("invariance", "variance", "covariance"), weights, strict=True))
    views = 0.5 * embeddings()  # standard deviations on both sides of 1
    assert_same(lambda z: variance_covariance(*z, **named), partial(variance_covariance_loop, **named), views)


def test_variance_and_covariance_do_not_see_a_shift():
    views = embeddings()
    shifted = views + torch.linspace(-3, 3, views.shape[-1], dtype=torch.float64)
    for own, other in zip(variance_covariance_terms(*views), variance_covariance_terms(*shifted), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=0)


def test_neither_the_order_of_views_nor_that_of_images_matters():
    views = embeddings()
    for other in (views.flip(0), views.flip(1)):
        torch.testing.assert_close(variance_covariance(*other), variance_covariance(*views), rtol=1e-12, atol=0)


def test_equal_rows_lack_all_variance_and_have_a_finite_gradient():
    views = torch.ones(2, 4, 3, dtype=torch.float64, requires_grad=True)
    terms = variance_covariance_terms(*views)
    assert [float(term.detach()) for term in terms] == pytest.approx([0, 0.99, 0])
    variance_covariance(*views).backward()
    assert views.grad.isfinite().all()


def test_covariances_of_each_ranks_part_by_itself_would_be_another_loss():
    """As some public code has it; that ours is the loss of the whole batch on several ranks is in test_over_ranks."""
    views = embeddings()
    apart = torch.stack([variance_covariance(*part) for part in views.chunk(2, dim=1)]).mean()
    assert abs(float(apart) / float(variance_covariance(*views)) - 1) > 0.01


def test_half_precision_is_computed_in_float32():
    views = embeddings().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = variance_covariance(*views)
    torch.testing.assert_close(loss, variance_covariance(*views.float()), rtol=0, atol=0)
