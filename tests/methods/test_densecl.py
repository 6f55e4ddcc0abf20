from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from largescale.config import load_config
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.densecl import DenseCL
from largescale.models.backbones import feature_map
from largescale.models.initialise import initialise_pieces
from largescale.plan.simulate import simulate
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.methods.harness import mini

MINI = ROOT / "tests/methods/mini/densecl.yaml"
BATCH, QUEUE = 6, 18


def build(*overrides: str) -> DenseCL:
    config = load_config(MINI, [f"train.global_batch={BATCH}", "data.streams=1", f"method.queue={QUEUE}", *overrides])
    torch.manual_seed(0)
    return build_method(config).double()


def views(step: int = 0, size: int = 24) -> Views:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(2 * BATCH, 3, size, size, generator=generator, dtype=torch.float64)
    return Views.numbered([images], BATCH)


def embed(parts: dict[str, torch.nn.Module], images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of an image's view: its embedding [B, D], its dense map [B, D, h, w], its backbone's map."""
    maps = feature_map(parts["backbone"], images)
    return normalize(parts["projection"](maps.mean((2, 3))), dim=1), parts["dense_projection"](maps), maps


def parts_of(method: DenseCL) -> dict[str, torch.nn.Module]:
    return {name: method.get_submodule(name) for name in ("backbone", "projection", "dense_projection")}


def pick(query: torch.Tensor, key: torch.Tensor, queue: list[torch.Tensor], temperature: float) -> torch.Tensor:
    mine, others = torch.exp(query @ key / temperature), torch.exp(torch.stack(queue) @ query / temperature)
    return -torch.log(mine / (mine + others.sum()))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a @ b / a.norm() / b.norm()).detach())


def naive_dense_loss(first: tuple, second: tuple, queue: list[torch.Tensor], temperature: float) -> torch.Tensor:
    """A cell at a time; correspondence by the maps of the backbone."""
    terms = []
    for mine, theirs, own_map, other_map in zip(first[1], second[1], first[2], second[2], strict=True):
        for a, cell in enumerate(own_map.flatten(1).T):
            b = max(range(other_map[0].numel()), key=lambda n: cosine(cell, other_map.flatten(1)[:, n]))
            query, key = normalize(mine.flatten(1)[:, a], dim=0), normalize(theirs.flatten(1)[:, b], dim=0)
            terms.append(pick(query, key, queue, temperature))
    return torch.stack(terms).mean()


def test_loss_gradient_and_queues_equal_the_naive_loop_over_steps():
    """Queues as lists; a step's own keys are never candidates, the second queue takes one pooled key per image."""
    method = build("method.dense_start_step=1").eval()
    queue, dense_queue = list(method.queue.rows.clone()), list(method.dense_queue.rows.clone())
    assert not torch.equal(method.queue.rows, method.dense_queue.rows)
    for step in range(3):
        batch = views(step, size=12)
        with torch.no_grad():
            second = embed(dict(method.teacher.items()), batch.images[0][BATCH:])
        first = embed(parts_of(method), batch.images[0][:BATCH])
        loss = method(batch, step).loss
        whole = torch.stack([pick(q, k, queue, 0.2) for q, k in zip(first[0], second[0], strict=True)]).mean()
        dense = naive_dense_loss(first, second, dense_queue, 0.2)
        expected = whole + 0 * dense if step == 0 else 0.5 * whole + 0.5 * dense
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        students = [p for p in method.parameters() if p.requires_grad]
        for ours, theirs in zip(
            torch.autograd.grad(loss, students), torch.autograd.grad(expected, students), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        place = step * BATCH % QUEUE
        queue[place : place + BATCH] = list(second[0])
        dense_queue[place : place + BATCH] = list(normalize(second[1].mean((2, 3)), dim=1))
        torch.testing.assert_close(method.queue.rows, torch.stack(queue), rtol=0, atol=1e-15)
        torch.testing.assert_close(method.dense_queue.rows, torch.stack(dense_queue), rtol=0, atol=1e-15)


def test_the_dense_part_of_one_cell_with_shared_heads_is_moco():
    method = build("data.crops=[{num: 2, size: 4}]").eval()
    with torch.no_grad():
        for dense, head in (
            (method.dense_projection, method.projection),
            (method.teacher["dense_projection"], method.teacher["projection"]),
        ):
            for mine, theirs in zip(dense.parameters(), head.parameters(), strict=True):
                mine.copy_(theirs.view_as(mine))
    method.dense_queue.rows = method.queue.rows.clone()
    for step in range(3):
        batch = views(step, size=4)
        assert feature_map(method.backbone, batch.images[0]).shape[2:] == (1, 1)
        dense, moco = (build_loss(method, weight, batch, step) for weight in (1.0, 0.0))
        torch.testing.assert_close(dense, moco, rtol=1e-12, atol=0)
        torch.testing.assert_close(method.dense_queue.rows, method.queue.rows, rtol=0, atol=1e-15)


def build_loss(method: DenseCL, weight: float, batch: Views, step: int) -> torch.Tensor:
    """The loss with a share of the dense part; queues are as before when it returns 1's, changed after 0's."""
    before = method.queue.rows, method.dense_queue.rows
    method.dense_config.dense_weight, method.dense_config.dense_start_step = weight, 0
    loss = method(batch, step).loss
    if weight:
        method.queue.rows, method.dense_queue.rows = before
    return loss


def test_keys_come_from_the_teacher_which_takes_no_gradient():
    """Published examples have run the student in the teacher's place."""
    method = build().eval()
    batch = views()
    before = method.targets(batch)
    with torch.no_grad():
        for part in parts_of(method).values():
            for parameter in part.parameters():
                parameter.mul_(1.5)
    assert all(torch.equal(value, before[name]) for name, value in method.targets(batch).items())
    with torch.no_grad():
        for part in method.teacher.values():
            for parameter in part.parameters():
                parameter.add_(0.1)
    assert all(not torch.equal(value, before[name]) for name, value in method.targets(batch).items())
    method(batch, 5).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert all(p.grad is not None for name, p in method.named_parameters() if not name.startswith("teacher."))


def test_all_of_the_teacher_follows():
    method = build()
    averaged = {average.teacher for average in method.averages() if average.buffers}
    assert averaged == {f"teacher.{name}" for name in parts_of(method)}


def test_the_dense_part_begins_at_its_step():
    method = build("method.dense_weight=0.3", "method.dense_start_step=7")
    assert [method.dense_weight(step) for step in (0, 6, 7, 8)] == [0, 0, 0.3, 0.3]
    [milestone] = method.milestones(load_config(MINI, ["method.dense_start_step=7"]))
    assert milestone.step == 7 and milestone.key == "method.dense_start_step"


def test_equal_cells_cost_as_much_as_a_guess():
    method = build().eval()
    row = torch.ones(8, dtype=torch.float64) / math.sqrt(8)
    with torch.no_grad():
        for part in (method.dense_projection, method.teacher["dense_projection"]):
            part[-1].weight.zero_()
            part[-1].bias.copy_(row)
    method.dense_queue.rows = row.expand(QUEUE, 8).clone()
    assert float(method(views(), 0).signs["dense_loss"]) == pytest.approx(math.log(QUEUE + 1))


def test_keys_and_pooled_keys_are_gathered_once_each():
    step = simulate(mini("densecl", "train.precision=fp32"), 2)
    assert {what.kind: count for what, count in step.counts.items() if what.of == "rows of the batch"} == {
        "all-gather": 2
    }


def test_small_views_are_refused():
    with pytest.raises(InputError, match=r"data.crops=4 views: expected two views in all with method.name=densecl"):
        build("data.crops=[{num: 2, size: 24}, {num: 2, size: 16}]")


def test_weights_that_are_drawn_in_pieces_are_distributed_like_those_of_the_constructors():
    method, drawn = (
        build("method.hidden=[200]", "method.embedding=64"),
        build("method.hidden=[200]", "method.embedding=64"),
    )
    initialise_pieces(drawn, 1)
    for name, usual in method.named_parameters():
        if "projection" in name:
            own = drawn.get_parameter(name)
            assert float(own.std()) == pytest.approx(float(usual.std()), rel=0.2), name
            assert float(own.abs().max()) == pytest.approx(float(usual.abs().max()), rel=0.1), name
