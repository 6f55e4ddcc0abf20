"""The context encoder's losses by a loop, what is seen of a hole, and that holes are filled.

Covers: largescale/methods/hole.py
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.context_encoder import DISCRIMINATOR, ContextEncoder
from largescale.methods.hole import hole_loss
from largescale.optim.roles import MAIN, role_of
from shards.ground.errors import InputError
from tests.helpers.doctor import said_of
from tests.helpers.one_view import BATCH, SIDE, built, log_sigmoid
from tests.helpers.one_view import random_views as views
from tests.methods.harness import mini

CENTRE = "method.mask=centre"


def build(*overrides: str) -> ContextEncoder:
    return built(ContextEncoder, "context_encoder", *overrides)


@pytest.mark.parametrize("overrides", [(), (CENTRE, "method.overlap=2", "method.overlap_weight=3")])
def test_both_losses_are_those_of_a_loop(overrides):
    """Weights stay as they are in between, and BatchNorm in evaluation mode lets images be taken one by one."""
    method, batch = build(*overrides).eval(), views()
    hole, weight = method.hole(batch.ids, SIDE, 3), method.config.overlap_weight
    size, share = method._side, method.config.adversarial
    first = (SIDE - size) // 2
    total, judged = 0.0, 0.0
    for number, image in enumerate(batch.images[0]):
        hidden, wanted = hole.hidden[number, 0].tolist(), hole.wanted[number, 0].tolist()
        seen = image.clone()
        for y in range(SIDE):
            for x in range(SIDE):
                if hidden[y][x]:
                    seen[:, y, x] = 0
        made = method.make(seen[None])[0].detach()
        filled, errors = image.clone(), []
        for y in range(SIDE):
            for x in range(SIDE):
                if wanted[y][x]:
                    filled[:, y, x] = made[:, y - first, x - first]
                    factor = 1 if hidden[y][x] else weight
                    errors += [factor * float(filled[c, y, x] - image[c, y, x]) ** 2 for c in range(3)]
        real, fake = (
            float(method.discriminator(one[None, :, first : first + size, first : first + size]).detach())
            for one in (image, filled)
        )
        total += ((1 - share) * sum(errors) / len(errors) - share * log_sigmoid(fake)) / BATCH
        judged -= (log_sigmoid(real) + log_sigmoid(-fake)) / 2 / BATCH
    assert float(method(batch, 3, MAIN).loss.detach()) == pytest.approx(total, rel=1e-11)
    assert float(method(batch, 3, DISCRIMINATOR).loss.detach()) == pytest.approx(judged, rel=1e-11)


def test_the_hole_in_the_middle_is_as_published():
    """A square of half the side, of which the outer 7 of 112 pixels are seen."""
    config = mini("context_encoder", CENTRE, "data.crops=[{num: 1, size: 224}]", "method.overlap=7")
    hole = build_method(config).hole(torch.arange(2), 224, 0)
    assert hole.side == 112
    assert hole.wanted[0, 0].nonzero().aminmax(dim=0)[0].tolist() == [56, 56]
    assert hole.hidden[0, 0].nonzero().aminmax(dim=0)[0].tolist() == [63, 63]
    assert hole.hidden[0, 0].nonzero().aminmax(dim=0)[1].tolist() == [160, 160]
    assert int(hole.hidden[0].sum()) == 98 * 98 and int(hole.wanted[0].sum()) == 112 * 112


@pytest.mark.parametrize("mask", ["blocks", "centre"])
def test_what_is_hidden_is_not_seen(mask):
    method, batch = build(f"method.mask={mask}").eval(), views()
    hole = method.hole(batch.ids, SIDE, 0)
    assert 0.05 < hole.hidden.double().mean() < hole.wanted.double().mean() <= 0.26
    other = torch.where(hole.hidden, views(seed=1).images[0], batch.images[0])
    made = [method.make(hole.hidden_in(images)) for images in (batch.images[0], other)]
    assert torch.equal(*made) and not torch.equal(batch.images[0], other)
    rim = torch.where(hole.wanted & ~hole.hidden, views(seed=1).images[0], batch.images[0])
    assert not torch.equal(method.make(hole.hidden_in(rim)), made[0])


def test_what_is_right_costs_nothing_and_what_is_outside_has_no_gradient():
    method, batch = build(), views()
    hole, [whole] = method.hole(batch.ids, SIDE, 0), batch.images
    assert float(hole_loss(whole, whole, hole, 10)) == 0
    made = torch.zeros_like(whole, requires_grad=True)
    hole_loss(made, whole, hole, 10).backward()
    scores = method.eval().discriminator(hole.filled(whole, made)).sum()
    for gradient in (made.grad, *torch.autograd.grad(scores, made)):
        assert torch.equal((gradient != 0).any(1, keepdim=True), hole.wanted)


def test_running_statistics_are_fed_once():
    """By the objective that moves a network: the discriminator's by images and fillings."""
    method, batch = build(), views()

    def counts() -> dict[str, list[int]]:
        norms = [
            (name, int(m.num_batches_tracked)) for name, m in method.named_modules() if isinstance(m, nn.BatchNorm2d)
        ]
        return {part: [n for name, n in norms if name.startswith(part)] for part in ("disc", "back", "bott", "deco")}

    assert {number for part in counts().values() for number in part} == {0}
    method(batch, 0, DISCRIMINATOR)
    assert {part: set(numbers) for part, numbers in counts().items()} == {
        "disc": {2},
        "back": {0},
        "bott": {0},
        "deco": {0},
    }
    method(batch, 0, MAIN)
    assert {part: set(numbers) for part, numbers in counts().items()} == {
        "disc": {2},
        "back": {1},
        "bott": {1},
        "deco": {1},
    }


def test_each_objective_takes_gradients_of_what_it_moves_alone():
    for objective in (DISCRIMINATOR, MAIN):
        method = build()
        method(views(), 0, objective).loss.backward()
        moved = {name.split(".")[0] for name, parameter in method.named_parameters() if parameter.grad is not None}
        assert moved == ({"discriminator"} if objective == DISCRIMINATOR else {"backbone", "bottleneck", "decoder"})
    role = role_of("discriminator.score.weight", method.roles())
    assert role is not None and role.objective == DISCRIMINATOR and role.lr_factor == pytest.approx(0.1)


def test_errors_alone_are_one_objective_without_a_discriminator():
    method = build("method.adversarial=0")
    assert method.objectives == (MAIN,) and method.roles() == [] and not hasattr(method, "discriminator")
    assert set(method(views(), 0).signs) == set(method.signs)
    assert len(method.panels(mini("context_encoder", "method.adversarial=0"))) == 1


def row_of(method: ContextEncoder, made: Tensor, batch: Views) -> dict[str, float]:
    """What is logged of images that were made."""
    method.make = lambda seen: made  # type: ignore[method-assign]
    outputs = [method(batch, 0, objective) for objective in method.objectives]
    signs = {name: value for output in outputs for name, value in output.signs.items()}
    assert set(signs) == set(method.signs)
    return method.measures(float(outputs[-1].loss), signs, len(batch.ids))


def test_the_mean_colour_is_called_no_filling():
    batch, config = views(), mini("context_encoder")
    mean = batch.images[0].mean((0, 2, 3), keepdim=True).expand(BATCH, 3, SIDE, SIDE)
    row = row_of(build(), mean, batch)
    assert row["unexplained"] == pytest.approx(1, abs=0.02)
    assert "the decoder gives the mean colour everywhere" in said_of(config, row)
    good = row_of(build(), batch.images[0] + 0.1, batch)
    assert good["unexplained"] == pytest.approx(0.01, rel=0.05) and good["rim_error"] == pytest.approx(0.01)
    assert said_of(config, good) == ""
    assert "is never fooled" in said_of(config, good | {"discriminator_accuracy": 0.999})
    assert {column for panel in build().panels(config) for column in panel.columns.values()} <= set(good)


def test_what_is_unexplained_does_not_depend_on_how_a_batch_is_split():
    whole = Views([torch.cat([views().images[0], 3 + views(seed=1).images[0]])], torch.arange(2 * BATCH))
    method = build().eval()
    halves = [Views([whole.images[0][part]], whole.ids[part]) for part in (slice(None, BATCH), slice(BATCH, None))]
    first, second = (method(half, 0).signs for half in halves)
    for name, value in method(whole, 0).signs.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, value, msg=name)


def test_holes_in_plain_images_are_filled():
    """Black or white ones: what is hidden is like what is not; and the discriminator starts at chance."""
    method = build("method.overlap=2", "method.adversarial=0.001").float()
    optimizers = {
        objective: torch.optim.Adam(of.parameters(), lr=lr, betas=(0.5, 0.999))
        for objective, of, lr in (
            (DISCRIMINATOR, method.discriminator, 0.0005),
            (MAIN, nn.ModuleList([method.backbone, method.bottleneck, method.decoder]), 0.005),
        )
    }
    generator, rows = torch.Generator().manual_seed(0), []
    for step in range(60):
        colours = torch.randn(16, 1, 1, 1, generator=generator).sign().expand(16, 3, SIDE, SIDE)
        batch, signs = Views([colours], torch.arange(16) + 16 * step), {}
        for objective, optimizer in optimizers.items():
            output = method(batch, step, objective)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            signs |= output.signs
        rows.append(method.measures(0.0, signs, 16))
    assert rows[0]["unexplained"] > 1
    assert 0.25 <= rows[0]["discriminator_accuracy"] <= 0.75
    assert rows[0]["discriminator_loss"] == pytest.approx(math.log(2), abs=0.2)
    assert sorted(row["unexplained"] for row in rows[-15:])[7] < 0.15


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["data.crops=[{num: 2, size: 24}]"], "data.crops=[2]: expected one group of one view"),
        (["method.overlap=3"], "method.overlap=3: expected less than half of the 6 px of a side of what is made"),
        ([CENTRE, "method.overlap=6"], "method.overlap=6: expected less than half of the 12 px"),
        ([CENTRE, "method.discriminator=[4,4,4,4]"], "expected at most 3 layers, which halve 12 px to one"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, words):
    with pytest.raises(InputError) as refusal:
        mini("context_encoder", *overrides)
    assert words in str(refusal.value)
