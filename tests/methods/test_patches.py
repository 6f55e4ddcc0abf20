from __future__ import annotations

import torch

from largescale.data.views import Views
from largescale.methods import build_method
from tests.methods.harness import mini

BATCH, SIDE = 5, 26


def views() -> Views:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return Views([images], torch.tensor([3, 8, 3, 1, 0]))


def test_loss_and_gradient_equal_the_naive_loop():
    method, batch = build_method(mini("patches")).double().eval(), views()
    tiles = method.task_views(batch, 4).images[0].unflatten(0, (BATCH, 9))
    expected = torch.zeros((), dtype=torch.float64)
    for own in tiles:
        z = [method.tile_head(method.backbone(tile[None]))[0] for tile in own]
        for direction, place in enumerate((0, 1, 2, 3, 5, 6, 7, 8)):
            logits = method.head(torch.cat([z[4], z[place]])[None])[0]
            expected = expected - torch.log(torch.exp(logits[direction]) / torch.exp(logits).sum()) / 8 / BATCH
    output = method(batch, 4)
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=0)
    parameters = list(method.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(output.loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_tiles_are_those_around_the_centre_in_reading_order():
    """Of images whose pixels say where they are."""
    config = mini("patches", "method.tile_normalisation=false", "method.aberration=none")
    where = torch.arange(float(SIDE * SIDE)).view(1, 1, SIDE, SIDE).expand(BATCH, 3, -1, -1)
    corner = build_method(config).task_views(Views([where], torch.arange(BATCH)), 0).images[0][:, 0, 0, 0]
    down, right = corner.long() // SIDE, corner.long() % SIDE
    assert (down // 8 * 3 + right // 8).view(BATCH, 9).tolist() == [list(range(9))] * BATCH
