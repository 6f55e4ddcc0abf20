from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from largescale.config import load_config
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.joint_embedding import unit
from largescale.methods.mocov3 import MoCoV3
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.doctor import said_of

MINI = ROOT / "tests/methods/mini/mocov3.yaml"
BATCH = 6


@pytest.fixture
def method() -> MoCoV3:
    torch.manual_seed(0)
    built = build_method(load_config(MINI), Length(num_steps=10, steps_per_epoch=5, num_samples=80)).double()
    with torch.no_grad():  # a teacher that has gone its own way
        for parameter in built.teacher.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return built.eval()


def views(small: bool = False) -> Views:
    generator = torch.Generator().manual_seed(1)
    sizes = (24, 24, 16)[: 3 if small else 2]
    return Views.numbered(
        [torch.randn(BATCH, 3, size, size, generator=generator, dtype=torch.float64) for size in sizes], BATCH
    )


def naive_loss(method: MoCoV3, batch: Views) -> Tensor:
    """A query at a time; twice the mean over pairs of a large view and another one."""
    temperature = method.config.temperature
    q = [unit(method.predictor(method.projection(method.backbone(view)))) for view in batch.images]
    with torch.no_grad():
        k = [unit(method.teacher["projection"](method.teacher["backbone"](view))) for view in batch.images[:2]]
    pairs = [(v, a) for a in range(2) for v in range(len(q)) if v != a]
    total = torch.zeros((), dtype=torch.float64)
    for v, a in pairs:
        for i in range(BATCH):
            candidates = [torch.exp(q[v][i] @ k[a][n] / temperature) for n in range(BATCH)]
            total = total - 2 * temperature * torch.log(candidates[i] / sum(candidates)) / BATCH
    return 2 * total / len(pairs)


@pytest.mark.parametrize("small", [False, True], ids=["two", "multi-crop"])
@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_loss_and_gradient_equal_the_naive_loop(method, temperature, small):
    method.config.temperature = temperature
    loss, expected = method(views(small), 0).loss, naive_loss(method, views(small))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    students = [p for p in method.parameters() if p.requires_grad]
    for ours, theirs in zip(torch.autograd.grad(loss, students), torch.autograd.grad(expected, students), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_order_of_views_and_of_images_does_not_matter(method):
    batch = views()
    loss = method(batch, 0).loss
    for images in (batch.images[::-1], [view.flip(0) for view in batch.images]):
        torch.testing.assert_close(method(batch._replace(images=images), 0).loss, loss, rtol=1e-12, atol=0)


def test_equal_embeddings_cost_as_much_as_a_guess_and_are_called_collapse(method):
    config = load_config(MINI)
    with torch.no_grad():
        for norm in (method.projection[-1], method.teacher["projection"][-1]):
            norm.weight.zero_()
            norm.bias.fill_(1)
        method.predictor[-1].weight.zero_()
        method.predictor[-1].weight[:, 0] = 1
    output = method(views(), 0)
    assert float(output.loss.detach()) == pytest.approx(4 * math.log(BATCH), rel=1e-9)
    row = method.measures(float(output.loss.detach()), output.signs, BATCH)
    assert row["embedding_spread"] == pytest.approx(0, abs=1e-9)
    assert "looks like collapse" in said_of(config, row)
    assert MoCoV3.loss_references(config)["all views alike"] == pytest.approx(4 * math.log(16))


def test_the_teacher_normalises_by_its_own_batch_and_follows_in_weights_alone(method):
    method.train()
    before = {name: value.clone() for name, value in method.teacher.named_buffers()}
    method(views(), 0)
    assert all(module.training for module in method.teacher.modules())
    changed = [name for name, value in method.teacher.named_buffers() if not torch.equal(value, before[name])]
    assert changed == list(before)
    assert {(one.student, one.buffers) for one in method.averages()} == {("backbone", False), ("projection", False)}
    assert not any(parameter.requires_grad for parameter in method.teacher.parameters())


def test_momentum_rises_to_1_one_step_ahead_as_the_published_code_counts(method):
    """It averages at the start of step t + 1, with that step's momentum; the first time, both networks are equal."""
    published = [1 - 0.1 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(11)]
    assert [method.average_momentum(step) for step in range(10)] == pytest.approx(published[1:])
    assert published[0] == pytest.approx(0.9) and published[10] == 1


def test_the_heads_are_the_published_ones():
    method = build_method(load_config(MINI))
    kinds = ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [type(layer).__name__ for layer in method.projection] == [*kinds, "BatchNorm1d"]
    assert [type(layer).__name__ for layer in method.predictor] == kinds
    assert not any(layer.bias is not None for head in (method.projection, method.predictor) for layer in head[::3])
    assert not any(parameter.requires_grad for parameter in method.projection[-1].parameters())


def test_one_large_view_is_refused():
    with pytest.raises(
        InputError, match=r"data.crops=1 views in the leading groups of one size: expected at least two large views"
    ):
        load_config(MINI, ["data.crops=[{num: 1, size: 24}, {num: 1, size: 16}]"])
