from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.cpc import CPC, RowsAbove
from shards.ground.errors import InputError
from tests.helpers.doctor import said_of
from tests.methods.harness import mini

BATCH, SIDE = 4, 24
GRID = 4
"""Cells of 8 px that begin 5 px after each other."""


def views() -> Views:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return Views([images], torch.tensor([3, 8, 3, 1]))


def build(*overrides: str) -> CPC:
    torch.manual_seed(0)
    method = build_method(mini("cpc", *overrides))
    assert isinstance(method, CPC)
    return method.double()


def context_by_a_loop(method: CPC, z: Tensor) -> Tensor:
    """Of patches [g, g, D], each place from itself, its neighbours and the three above."""
    for layer in method.context.layers:
        out = torch.empty_like(z)
        for t in range(GRID):
            for u in range(GRID):
                total = layer.bias
                for i, down in enumerate((-1, 0)):
                    for j, right in enumerate((-1, 0, 1)):
                        if t + down >= 0 and 0 <= u + right < GRID:
                            total = total + layer.weight[:, :, i, j] @ z[t + down, u + right].relu()
                out[t, u] = z[t, u] + total
        z = out
    return z


def test_the_loss_is_that_of_the_naive_loop():
    method, batch = build(), views()
    with torch.no_grad():
        patches = method.task_views(batch, 2).images[0]
        z = torch.stack([method.embedding(method.backbone(one[None]))[0] for one in patches])
        z = z.view(BATCH, GRID, GRID, -1)
        losses, right = [], 0
        for i in range(BATCH):
            c = context_by_a_loop(method, z[i])
            for number, k in enumerate((2, 3)):
                matrix = method.guesses.weight.view(2, -1, z.shape[-1])[number]
                for t in range(GRID - k):
                    for u in range(GRID):
                        scores = (z.flatten(0, 2) @ (matrix @ c[t, u])).tolist()
                        mine = (i * GRID + t + k) * GRID + u
                        losses.append(math.log(sum(map(math.exp, scores))) - scores[mine])
                        right += max(range(len(scores)), key=scores.__getitem__) == mine
        output = method(batch, 2)
    assert float(output.loss) == pytest.approx(sum(losses) / len(losses), rel=1e-10)
    assert float(output.signs["task_accuracy"]) == pytest.approx(right / len(losses))


def test_a_place_knows_its_row_and_those_above_alone():
    context = RowsAbove(5, 4)
    maps = torch.randn(2, 5, 6, 6)
    before = context(maps)
    for t in range(5):
        changed = maps.clone()
        changed[:, :, t + 1 :] = torch.randn(2, 5, 5 - t, 6)
        assert torch.equal(context(changed)[:, :, : t + 1], before[:, :, : t + 1])
    changed = maps.clone()
    changed[:, :, 0, 0] += 1
    assert not torch.equal(context(changed)[:, :, 3, 3], before[:, :, 3, 3])


def test_no_row_is_told_that_overlaps_with_what_is_known():
    assert list(build().ahead) == [2, 3]
    with pytest.raises(InputError, match=r"method\.rows=1: expected at least 2: nearer rows overlap"):
        mini("cpc", "method.rows=1")


def test_equal_patches_cost_the_logarithm_of_their_number_and_that_is_said():
    method, batch = build(), views()
    with torch.no_grad():
        method.embedding.weight.zero_()
    output = method(batch, 0)
    count = BATCH * GRID * GRID
    assert float(output.loss.detach()) == pytest.approx(math.log(count))
    config = mini("cpc", f"train.global_batch={BATCH}")
    assert list(CPC.loss_references(config).values()) == pytest.approx([math.log(count)])
    assert CPC.num_classes(mini("cpc", "train.accumulate=2")) == 8 * GRID * GRID
    assert "no better than uniform" in said_of(config, {"loss_over_ln_k": 1.0, "task_accuracy": 1 / count})


def test_patches_of_a_batch_do_not_know_each_other_without_batchnorm():
    batch = views()
    other = Views([torch.cat([batch.images[0][:1], torch.randn(3, 3, SIDE, SIDE, dtype=torch.float64)])], batch.ids)
    for norm, equal in (("layer", True), ("batch", False)):
        method = build(f"model.norm={norm}").train()
        first, second = (method.embed(method.task_views(one, 0))["patches"][0, 0] for one in (batch, other))
        assert torch.allclose(first, second, rtol=1e-12) == equal


def test_it_learns_what_comes_further_down():
    """Each column has a colour of its own, and each row its brightness in the third channel."""
    torch.manual_seed(0)
    method = build_method(mini("cpc", "train.precision=fp32", "method.embedding=32"))
    optimizer = torch.optim.Adam(method.parameters(), lr=0.003)
    generator, shares = torch.Generator().manual_seed(0), []
    rows = torch.linspace(-2, 2, SIDE)[:, None].expand(8, 1, SIDE, SIDE)
    for step in range(150):
        colours = torch.randn(8, 2, 1, 5, generator=generator).repeat_interleave(5, 3)[..., :SIDE]
        images = torch.cat([colours.expand(-1, -1, SIDE, -1), rows], dim=1)
        output = method(Views([images], torch.arange(8) + 8 * step), step)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        shares.append(float(output.signs["task_accuracy"]))
    assert shares[0] < 0.1 and sum(shares[-10:]) / 10 > 0.6


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["data.crops=[{num: 2, size: 24}]"], "data.crops=[2]: expected one group of one view"),
        (["model.backbone=alexnet_bn", "model.stem=imagenet"], "method.tile=7: expected at least 63 with model."),
        (["method.tile=9"], "method.tile=9: expected at most method.window, 8"),
        (["method.rows=4"], "method.rows=4: expected less than 4, the rows of views of 24 px"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, words):
    with pytest.raises(InputError) as refusal:
        mini("cpc", *overrides)
    assert words in str(refusal.value)
