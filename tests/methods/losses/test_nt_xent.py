from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from largescale.methods.losses import nt_xent
from tests.methods.losses.cases import embeddings
from tests.methods.losses.loops import assert_same, nt_xent_loop


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("num_views", [2, 3])
def test_loss_and_gradient_equal_the_naive_loop(num_views, temperature):
    views = torch.cat([embeddings(), embeddings().flip(2)])[:num_views]
    assert_same(partial(nt_xent, temperature=temperature), partial(nt_xent_loop, temperature=temperature), views)


def test_invariances():
    """Neither the order of views, nor that of images, nor a rotation, nor lengths matter."""
    views = embeddings()
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    loss = nt_xent(views)
    for other in (views.flip(0), views.flip(1), views @ rotation, 3 * views):
        torch.testing.assert_close(nt_xent(other), loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_views, num", [(2, 6), (3, 4), (2, 1)])
def test_equal_embeddings_cost_as_much_as_a_guess(num_views, num):
    views = torch.ones(num_views, num, 5, dtype=torch.float64, requires_grad=True)
    loss = nt_xent(views)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(1 + num_views * (num - 1)), abs=1e-12)
    assert views.grad.isfinite().all()


def test_small_temperatures_do_not_overflow():
    """exp(1 / 0.001) has no float32: the largest logit must go first."""
    views = embeddings().float().requires_grad_()
    loss = nt_xent(views, temperature=0.001)
    loss.backward()
    assert loss.isfinite() and views.grad.isfinite().all() and loss > 1


def test_half_precision_is_compared_in_float32():
    views = embeddings().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(views)
    torch.testing.assert_close(loss, nt_xent(views.float()), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, 6, 5), (12, 5)])
def test_one_view_is_refused(shape):
    with pytest.raises(ValueError, match=r"views of shape .*: expected \[V, B, D\] with two views or more"):
        nt_xent(torch.ones(shape))
