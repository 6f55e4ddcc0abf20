from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from largescale.methods.joint_embedding import unit
from largescale.methods.losses.soft_neighbours import (
    cross_entropies,
    crossing_targets,
    entropy_of,
    in_domain_neighbours,
    sharpened,
    smoothed_classes,
    soft_neighbours,
)

K = 3


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_probabilities_and_their_gradients_equal_the_naive_loop():
    queries, supports = unit(draws(2, 4, 5)).requires_grad_(), unit(draws(7, 5, seed=1)).requires_grad_()
    labels = torch.tensor([0, 2, 1, 1, 0, 2, 2])
    found = soft_neighbours(queries, supports, smoothed_classes(labels, K, 0.1, torch.float64), temperature=0.2)
    rows = []
    for query in queries.flatten(0, 1):
        weights = [torch.exp(query @ support / 0.2) for support in supports]
        rows.append(
            torch.stack(
                [
                    sum(
                        w * ((0.9 if int(label) == k else 0.0) + 0.1 / K)
                        for w, label in zip(weights, labels, strict=True)
                    )
                    for k in range(K)
                ]
            )
            / sum(weights)
        )
    expected = torch.stack(rows).view(2, 4, K)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    weight = draws(2, 4, K, seed=2)
    ours, theirs = (torch.autograd.grad((one * weight).sum(), (queries, supports)) for one in (found, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_of_two_orthogonal_classes_a_small_temperature_takes_one():
    axes = torch.eye(2, dtype=torch.float64)
    classes = smoothed_classes(torch.tensor([0, 1]), 2, 0.0, torch.float64)
    torch.testing.assert_close(soft_neighbours(axes, axes, classes, temperature=1e-3), axes)
    torch.testing.assert_close(
        soft_neighbours(unit(torch.ones(1, 2)), axes.float(), classes.float()), torch.full((1, 2), 0.5)
    )


def test_smoothed_classes_are_nine_tenths_their_own_and_a_tenth_everyones():
    found = smoothed_classes(torch.tensor([1, 0]), 4, 0.1, torch.float64)
    expected = torch.tensor([[0.025, 0.925, 0.025, 0.025], [0.925, 0.025, 0.025, 0.025]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_sharpening_raises_to_a_power():
    p = draws(6, K).softmax(-1)
    torch.testing.assert_close(sharpened(p, 0.25), p**4 / (p**4).sum(-1, keepdim=True))
    torch.testing.assert_close(sharpened(p, 1.0), p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_certain_stays_finite(dtype):
    """A tiny temperature and no smoothing leave zeros, whose logarithm is not finite."""
    queries, supports = torch.eye(2, dtype=dtype).requires_grad_(), torch.eye(2, dtype=dtype)
    p = soft_neighbours(queries, supports, torch.eye(2, dtype=dtype), temperature=1e-4)
    assert (p == torch.eye(2)).all()
    loss = cross_entropies(p.detach(), p).mean() - entropy_of(sharpened(p, 0.25).mean(0))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-math.log(2)) and queries.grad.isfinite().all()


def test_each_view_is_to_predict_what_the_other_large_ones_say():
    large = draws(3, 2, K).softmax(-1)
    found = crossing_targets(large[:2], 4)
    torch.testing.assert_close(found[:2], large[:2].flip(0))
    assert all(torch.equal(small, large[:2].mean(0)) for small in found[2:])
    torch.testing.assert_close(crossing_targets(large, 3)[1], (large[0] + large[2]) / 2)
    assert crossing_targets(large, 3).shape == (3, 2, K)


def test_votes_within_the_domain_are_where_the_naive_loop_stands_still():
    queries, supports = unit(draws(6, 5)), unit(draws(4, 5, seed=1))
    classes = smoothed_classes(torch.tensor([0, 2, 1, 1]), K, 0.1, torch.float64)
    found, in_domain = in_domain_neighbours(
        queries, supports, classes, temperature=0.3, label_ratio=2.0, prior_temperature=1.5
    )
    prior = [math.exp((max(float(q @ s) for s in supports) - 1) / 1.5) for q in queries]
    p = [torch.zeros(K, dtype=torch.float64)] * 6
    for _ in range(300):
        before, p = p, []
        for i, q in enumerate(queries):
            weights = [2.0 * 6 / 4 * math.exp(float(q @ s) / 0.3) for s in supports]
            others = {n: math.exp(float(q @ queries[n]) / 0.3) for n in range(6) if n != i}
            votes = sum(w * one for w, one in zip(weights, classes, strict=True))
            votes = votes + sum(w * before[n] for n, w in others.items())
            p.append(prior[i] * votes / (sum(weights) + sum(others.values())))
    expected = torch.stack(p)
    torch.testing.assert_close(in_domain, expected.sum(1), rtol=1e-9, atol=0)
    torch.testing.assert_close(found, expected + (1 - expected.sum(1, keepdim=True)) / K, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.sum(1), torch.ones(6, dtype=torch.float64))


def test_an_image_like_no_support_is_hardly_of_the_domain_and_its_classes_are_open():
    """The planted one is opposite to all supports; where all are on supports, all are of the domain."""
    supports = torch.eye(4, dtype=torch.float64)[:2]
    classes = smoothed_classes(torch.tensor([0, 1]), 2, 0.0, torch.float64)
    queries = torch.cat([supports, -unit(supports.sum(0, keepdim=True))])
    found, in_domain = in_domain_neighbours(queries, supports, classes, prior_temperature=0.3)
    assert in_domain[:2].min() > 0.95 and in_domain[2] < 0.05
    assert found[0, 0] > 0.95 and (found[2] - 0.5).abs().max() < 0.05
    _, alike = in_domain_neighbours(supports, supports, classes)
    torch.testing.assert_close(alike, torch.ones(2, dtype=torch.float64))
