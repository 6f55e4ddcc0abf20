"""BYOL, and what methods without negatives share.

Covers: largescale/methods/bootstrapped.py, largescale/methods/predicting.py,
largescale/models/heads.py
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from largescale.config import load_config
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.byol import BYOL
from largescale.models.heads import mlp
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.doctor import said_of

MINI = ROOT / "tests/methods/mini/byol.yaml"
BATCH = 6
TWO = "[{num: 2, size: 24}]"
CROPS = "[{num: 2, size: 24}, {num: 3, size: 16}]"


def build(*overrides: str) -> BYOL:
    torch.manual_seed(0)
    return build_method(load_config(MINI, list(overrides))).double()


def views(*sizes: int) -> Views:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(BATCH, 3, size, size, generator=generator, dtype=torch.float64) for size in sizes]
    return Views.numbered(images, BATCH)


def students(method: BYOL) -> list[nn.Parameter]:
    return [parameter for parameter in method.parameters() if parameter.requires_grad]


def naive_loss(method: BYOL, images: list[torch.Tensor], num_large: int) -> torch.Tensor:
    """A pair of views and an image at a time; every view goes through the networks by itself."""
    p = [method.predictor(method.projection(method.backbone(view))) for view in images]
    with torch.no_grad():
        k = [method.teacher["projection"](method.teacher["backbone"](view)) for view in images[:num_large]]
    terms = []
    for a in range(num_large):
        for v in range(len(images)):
            if v != a:
                terms += [2 - 2 * cosine_similarity(p[v][i], k[a][i], dim=0) for i in range(BATCH)]
    return 2 * torch.stack(terms).mean()


@pytest.mark.parametrize("crops, sizes", [(TWO, (24, 24)), (CROPS, (24, 24, 16, 16, 16))])
def test_loss_and_gradient_equal_the_naive_loop(crops, sizes):
    """In training mode: each view and each network has its own batch statistics."""
    method = build(f"data.crops={crops}")
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))  # as after some steps
    batch = views(*sizes)
    loss, expected = method(batch, 0).loss, naive_loss(method, batch.images, 2)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(loss, students(method)), torch.autograd.grad(expected, students(method)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_two_views_cost_the_sum_of_both_directions_and_may_be_swapped():
    method = build()
    first, second = views(24, 24).images
    loss = float(method(Views.numbered([first, second], BATCH), 0).loss.detach())
    assert loss == pytest.approx(float(method(Views.numbered([second, first], BATCH), 0).loss.detach()), rel=1e-12)
    assert 0 < loss < 8
    together = Views.numbered([torch.cat([first, second])], BATCH)
    assert float(method(together, 0).loss.detach()) == pytest.approx(loss, rel=1e-12)  # one group of two views


def test_the_teacher_is_a_copy_in_training_mode_that_takes_no_gradient():
    method = build()
    teacher = method.teacher["backbone"]
    assert all(torch.equal(*pair) for pair in zip(teacher.parameters(), method.backbone.parameters(), strict=True))
    method(views(24, 24), 0).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert all(p.grad is not None for name, p in method.named_parameters() if not name.startswith("teacher."))
    counts = {int(value) for name, value in method.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {2}  # both views, in student and teacher alike
    assert all(parameter.grad.abs().sum() > 0 for parameter in method.predictor.parameters())


def test_the_teacher_does_not_see_small_crops():
    method = build(f"data.crops={CROPS}").eval()
    batch = views(24, 24, 16, 16, 16)
    other = batch._replace(images=[*batch.images[:2], *(image + 1 for image in batch.images[2:])])
    assert torch.equal(method.targets(batch)["targets"], method.targets(other)["targets"])
    assert method.targets(batch)["targets"].shape == (2, BATCH, 8)


def test_momentum_rises_over_the_run():
    method = build()
    method.of_run(Length(num_steps=10, steps_per_epoch=5, num_samples=40))
    assert [method.average_momentum(step) for step in (0, 5, 10)] == pytest.approx([0.9, 0.95, 1.0])


def test_equal_embeddings_are_called_collapse_and_cost_nothing():
    method = build("method.predictor=false").eval()
    with torch.no_grad():
        for head in (method.projection, method.teacher["projection"]):
            head[1].weight.zero_()
            head[1].bias.fill_(1.0)
    output = method(views(24, 24), 0)
    assert float(output.loss.detach()) == pytest.approx(0, abs=1e-12)
    found = method.measures(0.0, output.signs, BATCH)
    assert found["agreement"] == pytest.approx(1)
    words = said_of(load_config(MINI, ["method.predictor=false"]), found)
    assert "looks like collapse" in words and "set method.predictor=true" in words
    assert "optim.lr=" in said_of(load_config(MINI), found)


def test_a_network_at_its_start_gets_no_warning():
    method = build()
    output = method(views(24, 24), 0)
    found = method.measures(float(output.loss.detach()), output.signs, BATCH)
    assert said_of(load_config(MINI), found) == ""


def test_without_predictor_embeddings_meet_the_teachers():
    method = build("method.predictor=false")
    assert list(method.predictor.parameters()) == []
    embedded = method.embed(views(24, 24))
    assert torch.equal(embedded["predictions"], embedded["embeddings"])


def test_heads_have_the_published_biases():
    method = build()
    for head in (method.projection, method.predictor):
        linear, norm, _, last = head
        assert linear.bias is not None and last.bias is None and norm.affine


def test_layers_of_a_head():
    head = mlp([3, 4, 5, 2], bias=False, last_bias=True, last_norm="plain")
    assert [type(layer).__name__ for layer in head] == 2 * ["Linear", "BatchNorm1d", "ReLU"] + ["Linear", "BatchNorm1d"]
    assert [layer.bias is not None for layer in head if isinstance(layer, nn.Linear)] == [False, False, True]
    assert [p.requires_grad for p in head[-1].parameters()] == [False, False]
    assert len(mlp([3, 2], bias=True, last_bias=False)) == 1


@pytest.mark.parametrize("crops", ["[{num: 1, size: 24}]", "[{num: 1, size: 24}, {num: 2, size: 16}]"])
def test_crops_without_two_large_views_are_refused(crops):
    with pytest.raises(InputError, match=r"data\.crops=1 views in the leading groups .*: expected at least two large"):
        load_config(MINI, [f"data.crops={crops}"])
