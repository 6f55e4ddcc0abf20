from __future__ import annotations

import pytest
import torch

from largescale.data.task_views.permutations import permutation_set
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.models.initialise import materialise
from shards.ground.errors import InputError
from tests.methods.harness import mini

BATCH, SIDE = 6, 24


def views() -> Views:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return Views([images], torch.tensor([3, 8, 3, 1, 0, 5]))


def test_loss_and_gradient_equal_the_naive_loop():
    method, batch = build_method(mini("jigsaw")).double().eval(), views()
    seen = method.task_views(batch, 4)
    tiles = seen.images[0].unflatten(0, (BATCH, -1))
    expected = torch.zeros((), dtype=torch.float64)
    for own, wanted in zip(tiles, seen.facts["permutation"].tolist(), strict=True):
        z = torch.cat([method.tile_head(method.backbone(tile[None]))[0] for tile in own])
        logits = method.head(z[None])[0]
        expected = expected - torch.log(torch.exp(logits[wanted]) / torch.exp(logits).sum()) / BATCH
    output = method(batch, 4)
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=0)
    parameters = list(method.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(output.loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_tiles_stand_in_the_order_of_the_permutation_that_is_wanted():
    """Of images whose cells differ in brightness."""
    config = mini("jigsaw", "method.tile_normalisation=false")
    cells = torch.arange(4.0).view(2, 2).repeat_interleave(12, 0).repeat_interleave(12, 1)
    seen = build_method(config).task_views(Views([cells.expand(40, 3, -1, -1)], torch.arange(40)), 0)
    found = seen.images[0][:, 0, 0, 0].view(40, 4).long()
    number = seen.facts["permutation"]
    assert found.tolist() == permutation_set(7, 4)[number].tolist()
    assert set(number.tolist()) == set(range(7)), "all of them come"


def test_more_permutations_than_there_are_are_refused():
    with pytest.raises(InputError, match=r"method\.permutations=25: expected at most 24"):
        mini("jigsaw", "method.permutations=25")


def test_a_network_that_no_rank_ever_held_has_the_same_permutations():
    config = mini("jigsaw")
    drawn = build_method(config, on_meta=True)
    materialise(drawn, torch.device("cpu"), 0)
    assert torch.equal(drawn.orders, build_method(config).orders)
    assert "orders" not in drawn.state_dict()
