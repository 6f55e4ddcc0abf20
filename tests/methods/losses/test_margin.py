from __future__ import annotations

import pytest
import torch
from torch import Tensor

from largescale.methods.losses import contrastive_margin
from tests.methods.losses.cases import embeddings, identities
from tests.methods.losses.loops import assert_same

IDS = identities().repeat(2)


def loop(views: Tensor, margin: float, over: str) -> Tensor:
    z = views.flatten(0, 1)
    terms = []
    for i in range(len(z)):
        for j in range(len(z)):
            if i != j:
                d = (z[i] - z[j]).norm()
                terms.append(d**2 if IDS[i] == IDS[j] else (margin - d).clamp_min(0) ** 2)
    return sum(terms) / len([term for term in terms if over == "all" or term > 0])


@pytest.mark.parametrize("over", ["all", "active"])
def test_loss_and_gradient_equal_the_naive_loop(over):
    assert_same(
        lambda views: contrastive_margin(views.flatten(0, 1), IDS, margin=3.0, over=over),
        lambda views: loop(views, 3.0, over),
        embeddings(),
    )


def test_different_images_beyond_the_margin_cost_nothing():
    z = torch.tensor([[0.0, 0], [0, 0], [3, 0], [3, 0]], requires_grad=True)
    loss = contrastive_margin(z, torch.tensor([1, 1, 2, 2]), margin=2.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-9) and z.grad.abs().max() < 1e-6


def test_equal_rows_of_different_images_have_a_finite_gradient():
    """The square root has none at 0."""
    z = torch.ones(4, 3, requires_grad=True)
    loss = contrastive_margin(z, torch.arange(4), margin=1.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1, abs=1e-4) and z.grad.isfinite().all()


def test_an_unknown_mean_is_refused():
    with pytest.raises(ValueError, match=r"over=some: expected all or active"):
        contrastive_margin(torch.ones(4, 3), torch.arange(4), over="some")
