from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from largescale.config import load_config
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.mocov2 import MoCoV2
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT

MINI = ROOT / "tests/methods/mini/mocov2.yaml"
BATCH = 6


def build(*overrides: str) -> MoCoV2:
    config = load_config(MINI, [f"train.global_batch={BATCH}", "data.streams=1", "method.queue=18", *overrides])
    torch.manual_seed(0)
    return build_method(config).double()


def views(step: int = 0) -> Views:
    generator = torch.Generator().manual_seed(step)
    return Views.numbered([torch.randn(2 * BATCH, 3, 24, 24, generator=generator, dtype=torch.float64)], BATCH)


def embed(backbone: torch.nn.Module, projection: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return normalize(projection(backbone(images)), dim=1)


def naive_loss(
    queries: torch.Tensor, keys: torch.Tensor, queue: list[torch.Tensor], temperature: float
) -> torch.Tensor:
    """A query at a time."""
    total = torch.zeros((), dtype=queries.dtype)
    for query, key in zip(queries, keys, strict=True):
        others = sum(torch.exp(query @ other / temperature) for other in queue)
        mine = torch.exp(query @ key / temperature)
        total = total - torch.log(mine / (mine + others))
    return total / len(queries)


def test_loss_gradient_and_queue_equal_the_naive_loop_over_steps():
    """The queue as a list of keys; a step's own keys are never among its candidates."""
    method = build().eval()
    queue = list(method.queue.clone())
    for step in range(5):
        batch = views(step)
        first, second = batch.images[0].chunk(2)
        with torch.no_grad():
            keys = embed(method.teacher["backbone"], method.teacher["projection"], second)
        loss = method(batch, step).loss
        expected = naive_loss(embed(method.backbone, method.projection, first), keys, queue, method.config.temperature)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        students = [p for p in method.parameters() if p.requires_grad]
        for ours, theirs in zip(
            torch.autograd.grad(loss, students), torch.autograd.grad(expected, students), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        place = step % 3 * BATCH
        queue[place : place + BATCH] = list(keys)
        torch.testing.assert_close(method.queue, torch.stack(queue), rtol=0, atol=1e-15)


def test_equal_embeddings_cost_as_much_as_a_guess_and_are_called_collapse():
    method = build().eval()
    row = torch.ones(8, dtype=torch.float64) / math.sqrt(8)
    with torch.no_grad():
        for projection in (method.projection, method.teacher["projection"]):
            projection[-1].weight.zero_()
            projection[-1].bias.copy_(row)
        method.queue.copy_(row.expand_as(method.queue))
    output = method(views(), 0)
    assert float(output.loss.detach()) == pytest.approx(math.log(18 + 1))
    found = method.measures(float(output.loss.detach()), output.signs, BATCH)
    assert "looks like collapse" in method.diagnose(load_config(MINI), found, found)


def test_a_network_begins_with_a_teacher_that_equals_it_and_takes_no_gradient():
    method = build()
    for student, teacher in zip(method.backbone.parameters(), method.teacher["backbone"].parameters(), strict=True):
        assert torch.equal(student, teacher) and student.data_ptr() != teacher.data_ptr()
    method(views(), 0).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert all(p.grad is not None for name, p in method.named_parameters() if not name.startswith("teacher."))


def test_the_teacher_stays_in_evaluation_mode():
    method = build()
    before = {name: value.clone() for name, value in method.teacher.named_buffers()}
    for _ in range(2):
        method(views(), 0)
        assert method.backbone.training and not any(module.training for module in method.teacher.modules())
        method.train()
    assert all(torch.equal(value, before[name]) for name, value in method.teacher.named_buffers())


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["method.queue=10"], "method.queue=10: expected a multiple of train.global_batch=6"),
        (["data.crops=[{num: 3, size: 24}]"], "data.crops=3 views: expected two views in all with method.name=mocov2"),
        (["method.momentum=1.5"], "method.momentum=1.5: expected"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, words):
    with pytest.raises(InputError) as refusal:
        build(*overrides)
    assert words in str(refusal.value)
