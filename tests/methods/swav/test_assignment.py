from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from largescale.methods.swav import observe
from largescale.methods.swav.assignment import Assignment, hardened, prior
from largescale.methods.swav.settings import Settings


def test_values_go_from_the_first_steps_to_the_last_steps():
    settings = Settings(epsilon=0.1, epsilon_end=0.02, temperature=0.2, temperature_end=0.1, sinkhorn_iterations=3)
    settings = replace(settings, sinkhorn_iterations_end=7, hard_codes_steps=2)
    first, middle, last, after = (Assignment.at(step, 11, settings) for step in (0, 5, 10, 30))
    assert (first.epsilon, first.temperature, first.iterations, first.hard) == (0.1, 0.2, 3, True)
    assert (middle.epsilon, middle.iterations, middle.hard) == (pytest.approx(0.06), 5, False)
    assert (last.epsilon, last.temperature, last.iterations) == (pytest.approx(0.02), pytest.approx(0.1), 7)
    assert after == last
    assert {Assignment.at(step, 11, Settings()) for step in range(11)} == {Assignment(0.05, 3, 0.1, False)}


def test_a_power_law_shares_out_all_samples():
    shares = prior(4, 1.0)
    torch.testing.assert_close(shares * 25 / 12, torch.tensor([1, 1 / 2, 1 / 3, 1 / 4], dtype=torch.float64))
    assert prior(4, 0) is None
    assert observe.balance([shares], 0.0, 10**6, 1.0) == pytest.approx(1)
    assert observe.balance([shares], 0.0, 10**6) < 1
    by_hand = sum(1 - (1 - share) ** 3 for share in shares.tolist()) / 4
    assert observe.reachable_usage([4], 3, 1.0) == pytest.approx(by_hand)


def test_hard_codes_are_the_nearest_prototype_alone():
    codes = torch.tensor([[[0.2, 0.5, 0.3], [0.4, 0.3, 0.3]]])
    assert hardened(codes).tolist() == [[[0, 1, 0], [1, 0, 0]]]
