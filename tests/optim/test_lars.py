from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from largescale.optim.lars import LARS
from largescale.optim.schedules import cosine_with_warmup


def naive_lars(weight, grads, *, lr, momentum, weight_decay, trust, scaled):
    """The update of the module's docstring, one parameter, in numpy."""
    weight, buffer = weight.copy(), np.zeros_like(weight)
    for grad in grads:
        g = grad + weight_decay * weight
        if scaled:
            w_norm, g_norm = np.linalg.norm(weight), np.linalg.norm(grad)
            if w_norm > 0 and g_norm > 0:
                g = g * trust * w_norm / (g_norm + weight_decay * w_norm + 1e-8)
        buffer = momentum * buffer + g
        weight = weight - lr * buffer
    return weight


@pytest.mark.parametrize("scaled", [True, False])
def test_equals_the_naive_loop(scaled):
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(4, 3)), rng.normal(size=(6, 4, 3))
    parameter = nn.Parameter(torch.from_numpy(start.copy()))
    lars = LARS(
        [{"params": [parameter], "scaled": scaled, "weight_decay": 0.01}], 0.3, momentum=0.8, trust_coefficient=0.05
    )
    for grad in grads:
        parameter.grad = torch.from_numpy(grad)
        lars.step()
    expected = naive_lars(start, grads, lr=0.3, momentum=0.8, weight_decay=0.01, trust=0.05, scaled=scaled)
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12)


def test_a_zero_gradient_changes_nothing_and_zero_weights_learn():
    still, empty = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
    still.grad, empty.grad = torch.zeros(3), torch.ones(3)
    LARS([still, empty], 0.1, weight_decay=0.1).step()
    assert torch.equal(still.detach(), torch.ones(3))
    torch.testing.assert_close(empty.detach(), torch.full((3,), -0.1))


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
