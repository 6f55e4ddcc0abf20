"""Equal clusters against a loop in numpy, and themselves on other numbers of ranks."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from largescale.clustering import optimal_transport
from largescale.clustering.optimal_transport import EqualClusters, equal_clusters, working_bytes
from largescale.plan.trace import StepTrace
from tests.helpers.ranks import run_ranks

COUNT, WIDTH, CLUSTERS = 305, 6, 5


@cache
def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(COUNT, WIDTH, generator=generator)
    return (
        features.to(dtype),
        torch.randn(CLUSTERS, WIDTH, generator=generator),
        torch.randn(CLUSTERS, generator=generator),
    )


def solve(features: Tensor, weights: Tensor, biases: Tensor, power: float = 3.0, **options: Any) -> EqualClusters:
    return equal_clusters(features, weights, biases, power=power, **{"tolerance": 1e-6, "iterations": 2000, **options})


def naive(features: Tensor, weights: Tensor, biases: Tensor, power: float, tolerance: float) -> tuple[np.ndarray, int]:
    """The published form, but for where it starts: all points' scales count, in every tenth iteration."""
    kernel = torch.softmax(features @ weights.double().T + biases.double(), dim=1).numpy() ** power
    beta, iterations, before = np.ones(kernel.shape[1]), 0, None
    while True:
        iterations += 1
        alpha = 1 / len(kernel) / (kernel @ beta)
        if iterations % 10 == 1 and before is not None and np.abs(before / alpha - 1).sum() < tolerance:
            return alpha[:, None] * kernel * beta, iterations
        before, beta = alpha, 1 / kernel.shape[1] / (alpha @ kernel)


@pytest.mark.parametrize("power", [1.0, 3.0, 10.0])
def test_labels_are_those_of_the_published_loop(power):
    features, weights, biases = problem()
    plan, iterations = naive(features, weights, biases, power, 1e-4)
    assert iterations > 1
    np.testing.assert_allclose(plan.sum(0), 1 / CLUSTERS, rtol=1e-3)
    np.testing.assert_allclose(plan.sum(1), 1 / COUNT, rtol=1e-9)
    found = solve(features, weights, biases, power, tolerance=1e-4)
    assert found.labels.tolist() == plan.argmax(1).tolist() and found.iterations == iterations
    assert found.error < 1e-4 and found.sizes.tolist() == np.bincount(plan.argmax(1), minlength=CLUSTERS).tolist()


def test_the_error_is_that_of_all_points():
    """Of clusters alone it would be the smaller, the more points there are."""
    features, weights, biases = problem()
    once, thrice = (
        solve(features.repeat(times, 1), weights, biases, tolerance=0, iterations=7).error for times in (1, 3)
    )
    assert once > 0 and thrice == pytest.approx(3 * once, rel=1e-9)


def test_clusters_are_of_nearly_equal_size_where_the_largest_scores_are_not():
    features, weights, biases = problem()
    largest = (features.float() @ weights.T + biases).argmax(1).bincount(minlength=CLUSTERS)
    found = solve(features, weights, biases, power=25.0)
    assert int(largest.max()) > 1.5 * COUNT / CLUSTERS
    assert (found.sizes - COUNT / CLUSTERS).abs().max() <= 0.05 * COUNT / CLUSTERS and int(found.sizes.sum()) == COUNT


def test_what_is_balanced_already_comes_back():
    generator = torch.Generator().manual_seed(0)
    known = torch.randperm(300, generator=generator) % CLUSTERS
    found = solve(torch.eye(CLUSTERS)[known] * 4, torch.eye(CLUSTERS), torch.zeros(CLUSTERS))
    assert torch.equal(found.labels, known) and found.sizes.tolist() == [60] * CLUSTERS


def test_without_any_difference_all_get_the_first_label():
    """Why labels are balanced before a network knows anything."""
    found = solve(torch.zeros(100, WIDTH), *problem()[1:2], torch.zeros(CLUSTERS))
    assert found.sizes.tolist() == [100, 0, 0, 0, 0] and found.iterations == 11


def test_scores_far_apart_neither_overflow_nor_leave_a_cluster_out():
    features, weights, _ = problem()
    biases = torch.tensor([0.0, 60.0, 20.0, -40.0, 0.0])  # the second is the largest of all, by far
    found = solve(features, weights, biases, power=25.0, tolerance=0.1)
    assert found.error < 0.1 and int(found.sizes.min()) > 0


@pytest.mark.parametrize(
    "features, words", [(torch.zeros(3, WIDTH), "3 points for 5"), (torch.full((9, WIDTH), torch.nan), "not finite")]
)
def test_what_cannot_be_labelled_is_refused(features, words):
    with pytest.raises(ValueError, match=words):
        solve(features, *problem()[1:])


def label_own() -> list[dict[str, Any]]:
    """Each rank has another number of points; the last of several has none."""
    optimal_transport._BLOCK = 64 * CLUSTERS  # several blocks
    size = dist.get_world_size()
    bounds = [0] + [COUNT * (place + 1) // (size + 1) for place in range(size - 2)] + [COUNT] * min(2, size)
    results = []
    for dtype in (torch.float64, torch.float32):
        features, weights, biases = problem(dtype)
        own = features[bounds[dist.get_rank()] : bounds[dist.get_rank() + 1]]
        beats: list[str] = []
        found = solve(own, weights, biases, beat=beats.append)
        assert len(beats) == -(-found.iterations // 10)
        results.append(vars(found))
    return results


@pytest.mark.distributed
def test_any_number_of_ranks_finds_the_same_bits():
    [alone] = run_ranks(label_own, 1)
    for ranks in (2, 3):
        found = run_ranks(label_own, ranks)
        for case, expected in enumerate(alone):
            assert torch.equal(torch.cat([one[case]["labels"] for one in found]), expected["labels"])
            for one in found:
                assert torch.equal(one[case]["sizes"], expected["sizes"])
                assert (one[case]["error"], one[case]["iterations"]) == (expected["error"], expected["iterations"])


@pytest.mark.parametrize("points, clusters", [(20_000, 50), (3000, 2000)])
def test_it_holds_no_more_than_it_promises(points, clusters):
    """Most bytes of all tensors, beside features."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(points, WIDTH, generator=generator)
    weights, biases = torch.randn(clusters, WIDTH, generator=generator), torch.zeros(clusters)
    with StepTrace() as trace:
        solve(features, weights, biases, iterations=12)
    held, promised = trace.lap(), working_bytes(points, clusters)
    assert 0.7 * promised < held <= promised, (held, promised)


def test_memory_is_a_number_per_point_and_cluster():
    assert working_bytes(10**6, 3000) == pytest.approx(8 * 3000 * 10**6, rel=0.01)
