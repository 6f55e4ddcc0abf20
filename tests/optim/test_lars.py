from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from largescale.optim.lars import LARS
from largescale.optim.optimizers import OPTIMIZERS
from largescale.optim.roles import parameter_groups, set_rates
from largescale.optim.schedules import cosine_with_warmup


def naive_lars(weight, grads, *, lr, momentum, weight_decay, trust, scaled, norm_of_sum=False):
    """The updates of the module's docstring, one parameter, in numpy."""
    weight, buffer = weight.copy(), np.zeros_like(weight)
    for grad in grads:
        g = grad + weight_decay * weight
        if scaled:
            w_norm, g_norm = np.linalg.norm(weight), np.linalg.norm(grad)
            if norm_of_sum:
                g = g * trust * w_norm / np.linalg.norm(g)
            elif w_norm > 0 and g_norm > 0:
                g = g * trust * w_norm / (g_norm + weight_decay * w_norm + 1e-8)
        buffer = momentum * buffer + g
        weight = weight - lr * buffer
    return weight


@pytest.mark.parametrize("denominator", ["sum_of_norms", "norm_of_sum"])
@pytest.mark.parametrize("scaled", [True, False])
def test_equals_the_naive_loop(scaled, denominator):
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(4, 3)), rng.normal(size=(6, 4, 3))
    parameter = nn.Parameter(torch.from_numpy(start.copy()))
    lars = LARS(
        [{"params": [parameter], "scaled": scaled, "weight_decay": 0.3}],
        0.3,
        momentum=0.8,
        trust_coefficient=0.05,
        trust_denominator=denominator,
    )
    for grad in grads:
        parameter.grad = torch.from_numpy(grad)
        lars.step()
    expected = naive_lars(
        start,
        grads,
        lr=0.3,
        momentum=0.8,
        weight_decay=0.3,
        trust=0.05,
        scaled=scaled,
        norm_of_sum=denominator == "norm_of_sum",
    )
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12)


def test_a_zero_gradient_changes_nothing_and_zero_weights_learn():
    still, empty = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
    still.grad, empty.grad = torch.zeros(3), torch.ones(3)
    LARS([still, empty], 0.1, weight_decay=0.1).step()
    assert torch.equal(still.detach(), torch.ones(3))
    torch.testing.assert_close(empty.detach(), torch.full((3,), -0.1))


def one_step(scale: float, denominator: str, start: float = 1.0) -> torch.Tensor:
    parameter = nn.Parameter(torch.linspace(start, 2 * start, 3, dtype=torch.float64))
    parameter.grad = scale * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    LARS([parameter], 0.1, weight_decay=scale * 0.3, trust_denominator=denominator, eps=0.0).step()
    return parameter.detach()


@pytest.mark.parametrize("denominator", ["sum_of_norms", "norm_of_sum"])
def test_a_factor_of_gradient_and_decay_changes_nothing(denominator):
    """So gradients that are too small by the number of ranks are a decay that is too large by it."""
    torch.testing.assert_close(one_step(16, denominator), one_step(1, denominator), rtol=1e-14, atol=0)


def test_decay_alone_shrinks_weights_by_the_trust_coefficient_and_zeros_stay():
    weights, zeros = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
    weights.grad, zeros.grad = torch.zeros(3), torch.zeros(3)
    LARS([weights, zeros], 0.5, weight_decay=0.1, trust_coefficient=0.01, trust_denominator="norm_of_sum").step()
    torch.testing.assert_close(weights.detach(), torch.full((3,), 1 - 0.5 * 0.01))
    assert torch.equal(zeros.detach(), torch.zeros(3))


def test_biases_and_normalisation_may_have_a_rate_of_their_own():
    config = OPTIMIZERS["lars"].Settings(lr=0.2, bias_and_norm_lr_factor=0.0015)
    groups = parameter_groups(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), [], config)
    set_rates(groups, step=0, lr=0.1, peak=0.2)
    assert [(group["lr"], group["scaled"]) for group in groups] == [(0.1, True), (pytest.approx(0.00015), False)]


def test_a_parameter_without_gradient_gets_no_state():
    used, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    used.grad = torch.ones(3)
    lars = LARS([used, frozen], 0.1)
    lars.step()
    assert frozen not in lars.state and torch.equal(frozen.detach(), torch.ones(3))


def test_the_gradient_is_left_as_it_was():
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 2.0)
    LARS([parameter], 0.1, weight_decay=0.5).step()
    assert torch.equal(parameter.grad, torch.full((3,), 2.0))


def test_schedule_warms_up_then_follows_a_cosine():
    rates = cosine_with_warmup(peak=1.0, final=0.1, start=0.2, warmup_steps=4, num_steps=104)
    assert len(rates) == 104
    np.testing.assert_allclose(rates[:5], [0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[54] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert (np.diff(rates[4:]) < 0).all()
