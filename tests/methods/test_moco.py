"""Both versions with a queue: losses, gradients and queues of steps against loops.

Covers: largescale/methods/mocov1.py, largescale/methods/mocov2.py
"""

from __future__ import annotations

import math

import pytest
import torch

from largescale.config import load_config
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.joint_embedding import unit
from largescale.methods.moco import MoCo
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.doctor import said_of
from tests.methods.losses.loops import info_nce_loop

BATCH = 6
TWO = [2]
"""Views of the first size."""
MULTI = [2, 3]
"""Views of the first size, and of a smaller one."""


def build(*overrides: str, name: str = "mocov2", views: list[int] = TWO) -> MoCo:
    crops = ",".join(f"{{num: {num}, size: {size}}}" for num, size in zip(views, (24, 16), strict=False))
    sizes = [f"train.global_batch={BATCH}", "data.streams=1", "method.queue=18", f"data.crops=[{crops}]"]
    torch.manual_seed(0)
    method = build_method(load_config(ROOT / f"tests/methods/mini/{name}.yaml", [*sizes, *overrides])).double()
    method.queue.rows = unit(method.queue.rows)  # in float64 as well
    return method


def views_of_step(step: int = 0, views: list[int] = TWO) -> Views:
    generator = torch.Generator().manual_seed(step)
    shapes = [(num * BATCH, 3, size, size) for num, size in zip(views, (24, 16), strict=False)]
    return Views.numbered([torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes], BATCH)


@pytest.mark.parametrize("views", [TWO, MULTI], ids=["two", "multi-crop"])
@pytest.mark.parametrize("name", ["mocov1", "mocov2"])
def test_loss_gradient_and_queue_equal_the_naive_loop_over_steps(name, views):
    """The queue as a list of keys; a step's own keys are never among its candidates."""
    method = build(name=name, views=views).eval()
    queue = list(method.queue.rows.clone())
    for step in range(5):
        batch = views_of_step(step, views)
        seen = [view for group in batch.images for view in group.split(BATCH)]
        with torch.no_grad():
            keys = unit(method.teacher["projection"](method.teacher["backbone"](seen.pop(1))))
        loss = method(batch, step).loss
        losses = [
            info_nce_loop(method.projection(method.backbone(view)), keys, torch.stack(queue), method.config.temperature)
            for view in seen
        ]
        expected = torch.stack(losses).mean()
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        students = [p for p in method.parameters() if p.requires_grad]
        for ours, theirs in zip(
            torch.autograd.grad(loss, students), torch.autograd.grad(expected, students), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        place = step % 3 * BATCH
        queue[place : place + BATCH] = list(keys)
        torch.testing.assert_close(method.queue.rows, torch.stack(queue), rtol=0, atol=1e-15)


def test_a_query_that_equals_its_key_costs_less_than_ln_2():
    """Where a step's own keys are candidates as well, each is right and wrong at once: no loss is below ln 2."""
    method = build().eval()
    keys, queue = torch.eye(8, dtype=torch.float64)[:BATCH], torch.eye(8, dtype=torch.float64)[6:].repeat(9, 1)
    losses = []
    for rows in (queue, torch.cat([keys, queue[BATCH:]])):
        method.queue.rows = rows
        losses.append(float(method.loss({"queries": keys[None], "keys": keys[None]}, torch.arange(BATCH), 0).loss))
    assert losses[0] == pytest.approx(math.log(1 + 18 * math.exp(-1 / method.config.temperature))) and losses[0] < 0.2
    assert losses[1] > math.log(2)


def test_equal_embeddings_cost_as_much_as_a_guess_and_are_called_collapse():
    method = build().eval()
    row = torch.ones(8, dtype=torch.float64) / math.sqrt(8)
    with torch.no_grad():
        for projection in (method.projection, method.teacher["projection"]):
            projection[-1].weight.zero_()
            projection[-1].bias.copy_(row)
        method.queue.rows.copy_(row.expand_as(method.queue.rows))
    output = method(views_of_step(), 0)
    assert float(output.loss.detach()) == pytest.approx(math.log(18 + 1))
    config = load_config(ROOT / "tests/methods/mini/mocov2.yaml")
    found = method.measures(float(output.loss.detach()), output.signs, BATCH)
    assert "looks like collapse" in said_of(config, found)
    assert type(method).loss_references(config)["all views alike"] == pytest.approx(math.log(32 + 1))


def test_a_network_begins_with_a_teacher_that_equals_it_and_takes_no_gradient():
    """Its head too, and the head follows as the backbone does."""
    method = build()
    for part in ("backbone", "projection"):
        teacher = method.teacher[part].state_dict()
        for name, value in method.get_submodule(part).state_dict().items():
            assert torch.equal(value, teacher[name]) and value.data_ptr() != teacher[name].data_ptr()
    assert {average.teacher for average in method.averages()} == {"teacher.backbone", "teacher.projection"}
    method(views_of_step(), 0).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert all(p.grad is not None for name, p in method.named_parameters() if not name.startswith("teacher."))


def test_the_teacher_stays_in_evaluation_mode():
    method = build()
    before = {name: value.clone() for name, value in method.teacher.named_buffers()}
    for _ in range(2):
        method(views_of_step(), 0)
        assert method.backbone.training and not any(module.training for module in method.teacher.modules())
        method.train()
    assert all(torch.equal(value, before[name]) for name, value in method.teacher.named_buffers())


def test_the_key_is_the_last_large_view_in_a_crop_group_of_its_own_too():
    method = build("data.crops=[{num: 1, size: 24}, {num: 1, size: 24}, {num: 1, size: 16}]").eval()
    seen = [torch.randn(BATCH, 3, size, size, dtype=torch.float64) for size in (24, 24, 16)]
    output = method(Views.numbered(seen, BATCH), 0)
    keys = unit(method.teacher["projection"](method.teacher["backbone"](seen[1])))
    torch.testing.assert_close(output.evidence["keys"], keys)
    assert output.evidence["queries"].shape == (2, BATCH, 8)


def test_version_1_has_a_linear_head():
    assert [type(layer) for layer in build(name="mocov1").projection] == [torch.nn.Linear]


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["method.queue=10"], "method.queue=10: expected a multiple of train.global_batch=6"),
        (["data.crops=[{num: 1, size: 24}]"], "data.crops=1 view: expected two or more views with method.name=mocov2"),
        (["method.momentum=1.5"], "method.momentum=1.5: expected"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, words):
    with pytest.raises(InputError) as refusal:
        build(*overrides)
    assert words in str(refusal.value)
