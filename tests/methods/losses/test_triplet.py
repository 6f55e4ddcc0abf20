from __future__ import annotations

import pytest
import torch
from torch import Tensor

from largescale.methods.losses import triplet
from tests.methods.losses.cases import embeddings, identities
from tests.methods.losses.loops import assert_same

IDS = identities().repeat(2)


def loop(views: Tensor, margin: float, mining: str) -> Tensor:
    z = views.flatten(0, 1)
    active = []
    for a in range(len(z)):
        d = [(z[a] - z[j]).norm() for j in range(len(z))]
        partners = [d[j] for j in range(len(z)) if j != a and IDS[j] == IDS[a]]
        others = [d[j] for j in range(len(z)) if IDS[j] != IDS[a]]
        triplets = [(max(partners), min(others))]
        if mining == "semi_hard":
            triplets = [(near, min(beyond)) for near in partners if (beyond := [far for far in others if far > near])]
        active += [near - far + margin for near, far in triplets if near - far + margin > 0]
    return sum(active) / len(active)


@pytest.mark.parametrize("mining", ["batch_hard", "semi_hard"])
def test_loss_and_gradient_equal_the_naive_loop(mining):
    assert_same(
        lambda views: triplet(views.flatten(0, 1), IDS, margin=0.5, mining=mining),
        lambda views: loop(views, 0.5, mining),
        embeddings(),
    )


@pytest.mark.parametrize("mining", ["batch_hard", "semi_hard"])
@pytest.mark.parametrize("ids", [[0, 1, 2], [0, 0, 0]], ids=["no partner", "no other"])
def test_rows_that_make_no_triplet_cost_nothing(mining, ids):
    z = embeddings()[0, :3].requires_grad_()
    loss = triplet(z, torch.tensor(ids), mining=mining)
    loss.backward()
    assert loss == 0 and torch.equal(z.grad, torch.zeros_like(z))


def test_semi_hard_leaves_out_others_nearer_than_the_partner():
    z = torch.tensor([[0.0], [1.0], [0.5]])
    ids = torch.tensor([0, 0, 1])
    assert triplet(z, ids, margin=0.2, mining="semi_hard") == 0
    assert float(triplet(z, ids, margin=0.2)) == pytest.approx(0.7)


def test_unknown_mining_is_refused():
    with pytest.raises(ValueError, match=r"mining=hard: expected batch_hard or semi_hard"):
        triplet(torch.ones(4, 3), torch.arange(4), mining="hard")
