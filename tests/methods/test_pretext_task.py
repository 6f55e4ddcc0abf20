from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from largescale.config import load_config
from largescale.methods import METHODS, build_method
from largescale.methods.pretext_task import PretextTask
from tests.helpers.commands import ROOT
from tests.helpers.doctor import said_of
from tests.methods.harness import mini

TASKS = [name for name, method in METHODS.items() if getattr(method, "loss", None) is PretextTask.loss]


def logged(name: str, logits: Tensor, wanted: Tensor) -> tuple[float, dict[str, float]]:
    """The loss and what is logged of such answers."""
    method = build_method(mini(name))
    output = method.loss({"logits": logits, "wanted": wanted}, torch.arange(logits.shape[1]), 0)
    return float(output.loss), method.measures(float(output.loss), output.signs, logits.shape[1])


@pytest.mark.parametrize("name", TASKS)
def test_equal_answers_cost_ln_k_and_are_said_to_be_no_better_than_chance(name):
    config = mini(name)
    shares = torch.tensor(METHODS[name].class_shares(config), dtype=torch.float64)
    assert len(shares) == METHODS[name].num_classes(config) and float(shares.sum()) == pytest.approx(1)
    wanted = torch.arange(len(shares)).repeat_interleave((8 * len(shares) * shares).round().long())[None]
    loss, row = logged(name, shares.log().expand(1, wanted.numel(), -1), wanted)
    assert [loss] == pytest.approx(list(METHODS[name].loss_references(config).values()))
    assert row["task_chance"] == pytest.approx(max(shares.tolist())) == pytest.approx(row["task_accuracy"])
    assert row["loss_over_ln_k"] == pytest.approx(1)
    assert "task is not learnt" in said_of(config, row) or "no better than uniform" in said_of(config, row)


@pytest.mark.parametrize("name", TASKS)
def test_the_share_told_right_is_that_of_a_loop(name):
    count = METHODS[name].num_classes(mini(name))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 40, count, generator=generator, dtype=torch.float64)
    wanted = torch.randint(count, (1, 40), generator=generator)
    loss, row = logged(name, logits, wanted)
    losses, right = [], 0
    for own, k in zip(logits[0].tolist(), wanted[0].tolist(), strict=True):
        losses.append(math.log(sum(map(math.exp, own))) - own[k])
        right += max(range(count), key=own.__getitem__) == k
    assert loss == pytest.approx(sum(losses) / 40, rel=1e-12)
    assert row["task_accuracy"] == pytest.approx(right / 40)
    assert METHODS[name].brief(row) == f" ({right / 40:.1%} right)"
    assert said_of(mini(name), row | {"loss_over_ln_k": 0.9}) == ""
    assert "predictions are no better than uniform" in said_of(mini(name), row | {"loss_over_ln_k": 0.99})


@pytest.mark.parametrize("name", TASKS)
def test_curves_are_of_columns_that_are_logged(name):
    count = METHODS[name].num_classes(mini(name))
    _, row = logged(name, torch.zeros(1, 4, count), torch.zeros(1, 4, dtype=torch.int64))
    for panel in METHODS[name].panels(mini(name)):
        assert set(panel.columns.values()) <= set(row)


@pytest.mark.parametrize("name", TASKS)
def test_a_solved_task_is_no_alarm_with_its_cures(name):
    solved = {"task_accuracy": 0.995, "loss_over_ln_k": 0.02}
    assert said_of(load_config(ROOT / f"configs/small/{name}.yaml"), solved) == ""
