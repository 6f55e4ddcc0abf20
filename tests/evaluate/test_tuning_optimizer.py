from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from largescale.evaluate import finetune, low_shot_finetune, tuning_optimizer
from largescale.evaluate.training_recipe import Recipe, rate_factor

RATES = {"trunk": 0.3, "head": 2.0}
DECAY = 0.01


def networks() -> tuple[nn.Module, nn.Module]:
    """A trunk with what LARS scales and what not, and a classifier."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).double(), nn.Linear(4, 3).double()


def groups(trunk: nn.Module, head: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [*head.parameters()], "rate": RATES["head"]},
        {"params": [*trunk.parameters()], "rate": RATES["trunk"], "is_trunk": True},
    ]


def gradients(step: int, parameters: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(one.shape, generator=generator, dtype=torch.float64) for one in parameters]


def test_lars_scales_the_trunks_kernels_alone():
    """As SimCLRv2's code does, step by step."""
    trunk, head = networks()
    optimizer = tuning_optimizer.build("lars", groups(trunk, head), weight_decay=DECAY)
    parameters = [*trunk.parameters(), *head.parameters()]
    expected, momenta = [one.detach().clone() for one in parameters], [torch.zeros_like(one) for one in parameters]
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] / (step + 1)
        for number, (one, gradient) in enumerate(zip(parameters, gradients(step, parameters), strict=True)):
            one.grad = gradient.clone()
            in_trunk, weight = number < 4, expected[number]
            if in_trunk and one.dim() > 1:
                gradient = gradient + DECAY * weight
                gradient = gradient * 0.001 * weight.norm() / gradient.norm()
            momenta[number] = 0.9 * momenta[number] + gradient
            rate = RATES["trunk" if in_trunk else "head"] / (step + 1)
            expected[number] = weight - rate * momenta[number]
        optimizer.step()
    torch.testing.assert_close([one.detach() for one in parameters], expected, rtol=1e-12, atol=1e-12)


def test_sgd_has_one_rate_and_decay_for_all_of_a_group():
    trunk, head = networks()
    optimizer = tuning_optimizer.build("sgd", groups(trunk, head), weight_decay=DECAY, nesterov=True)
    assert isinstance(optimizer, torch.optim.SGD)
    assert [(group["rate"], group["weight_decay"], group["nesterov"]) for group in optimizer.param_groups] == [
        (RATES["head"], DECAY, True),
        (RATES["trunk"], DECAY, True),
    ]


@pytest.mark.parametrize("optimizer, rates, drops", [("sgd", (0.01, 0.2), (0.6, 0.8)), ("lars", (0.04, 0.04), ())])
def test_protocols_say_which(monkeypatch, optimizer, rates, drops):
    """And LARS follows a cosine, at its published rates where none are given."""
    recipes: list[Recipe] = []

    def noted(trial: object, recipe: Recipe) -> None:
        recipes.append(recipe)

    for module in (low_shot_finetune, finetune):
        monkeypatch.setattr(module, "trained_scores", noted)
        monkeypatch.setattr(module, "accuracies", lambda scores: {})
    monkeypatch.setattr(low_shot_finetune, "_split", lambda *_: ("split.npy", 9))
    few = low_shot_finetune.Settings(low_shot_finetune_share=0.1, low_shot_finetune_optimizer=optimizer)
    low_shot_finetune.measure(None, few)
    finetune.measure(None, finetune.Settings(finetune_optimizer=optimizer))
    first, second = recipes
    assert (first.optimizer, first.trunk_rate, first.head_rate, first.drops) == (optimizer, *rates, drops)
    assert second.optimizer == optimizer and bool(second.drops) == (optimizer == "sgd")
    if not drops:
        assert rate_factor(first, 0.5) == pytest.approx(0.5)
