from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import normalize

from largescale.methods.sinkhorn import sinkhorn
from tests.helpers.codes import oracle
from tests.helpers.ranks import Counted, run_ranks

pytestmark = pytest.mark.distributed

ROWS = {1: [37], 2: [30, 7], 4: [20, 1, 0, 16]}
SETTINGS = [(0.05, 3), (0.03, 10), (0.01, 3), (0.005, 2), (0.05, 1), (0.0014, 3), (0.001, 4), (0.0002, 2)]
RANGES = {0.0014: 2, 0.001: 2, 0.0002: 9}
"""Where one range of exponents is too small for cosines over epsilon: how many the first all-reduce sums."""


def all_scores() -> torch.Tensor:
    """Two problems of 37 rows and 11 prototypes, one prototype far from every row."""
    generator = torch.Generator().manual_seed(5)
    rows = normalize(torch.randn(2, 37, 6, generator=generator), dim=-1)
    prototypes = normalize(torch.randn(11, 6, generator=generator), dim=-1)
    scores = rows @ prototypes.T
    scores[..., 3] = -1
    return scores


def codes_of_this_rank(rows: list[int]) -> list[tuple[torch.Tensor, torch.Tensor, list[tuple[str, int]]]]:
    rank = dist.get_rank()
    start = sum(rows[:rank])
    local = all_scores()[:, start : start + rows[rank]]
    results = []
    for epsilon, iterations in SETTINGS:
        with Counted() as counted:
            codes = sinkhorn(local, epsilon=epsilon, iterations=iterations)
        wide = sinkhorn(local.double(), epsilon=epsilon, iterations=iterations)
        results.append((codes, wide, counted.calls))
    return results


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_unequal_rows_equal_the_oracle_with_exactly_iterations_all_reduces(world_size):
    per_rank = run_ranks(codes_of_this_rank, world_size, ROWS[world_size])
    for number, (epsilon, iterations) in enumerate(SETTINGS):
        expected = oracle(all_scores(), epsilon, iterations)
        codes = torch.cat([results[number][0] for results in per_rank], dim=1)
        # A cosine in float32 is only known to 6e-8, over epsilon.
        torch.testing.assert_close(codes.double(), expected, rtol=0, atol=max(1e-5, 6e-8 / epsilon))
        wide = torch.cat([results[number][1] for results in per_rank], dim=1)
        torch.testing.assert_close(wide, expected, rtol=0, atol=1e-12)
        sizes = [2 * 11 * RANGES.get(epsilon, 1), *[2 * 11] * (iterations - 1)]
        for results in per_rank:
            assert results[number][2] == ([("all_reduce", size) for size in sizes] if world_size > 1 else [])


def weak_and_strong_scores() -> torch.Tensor:
    """Rows of one rank with small scores, of the other with large ones: at epsilon 0.02 they compute differently."""
    return torch.cat([0.3 * all_scores()[:, :20], all_scores()[:, 20:]], dim=1)


PRIOR = torch.arange(1.0, 12.0, dtype=torch.float64) / 66


def codes_with_a_prior() -> list[torch.Tensor]:
    start = 20 * dist.get_rank()
    local = all_scores()[:, start : start + 20 if start == 0 else None].double()
    return [sinkhorn(local, epsilon=epsilon, iterations=3, prior=PRIOR) for epsilon in (0.05, 0.002)]


def test_a_prior_is_that_of_the_rows_of_all_ranks():
    per_rank = run_ranks(codes_with_a_prior, 2)
    for number, epsilon in enumerate((0.05, 0.002)):
        codes = torch.cat([results[number] for results in per_rank], dim=1)
        torch.testing.assert_close(codes, oracle(all_scores(), epsilon, 3, PRIOR), rtol=0, atol=1e-12)


def codes_of_uneven_ranges() -> torch.Tensor:
    return sinkhorn(
        weak_and_strong_scores()[:, :20] if dist.get_rank() == 0 else weak_and_strong_scores()[:, 20:],
        epsilon=0.02,
        iterations=4,
    )


def test_ranks_whose_scores_differ_in_range_still_agree():
    expected = oracle(weak_and_strong_scores(), 0.02, 4)
    codes = torch.cat(run_ranks(codes_of_uneven_ranges, 2), dim=1)
    torch.testing.assert_close(codes.double(), expected, rtol=0, atol=1e-5)


def codes_of_a_nan() -> torch.Tensor:
    scores = all_scores()[:, :10]
    scores[0, 3, 2] = float("nan") if dist.get_rank() == 1 else 0.0
    return sinkhorn(scores, epsilon=0.001, iterations=2, check_range=False)


def test_a_nan_reaches_the_loss_of_all_ranks_where_it_is_looked_for():
    for codes in run_ranks(codes_of_a_nan, 2):
        assert codes[0].isnan().any() and codes[1].isfinite().all()


def error_of_this_rank() -> str:
    try:
        sinkhorn(torch.full((4, 3), 40.0), epsilon=0.05, iterations=3)
    except ValueError as error:
        return str(error)
    return ""


def test_a_range_that_cannot_be_summed_is_a_clear_error():
    for message in run_ranks(error_of_this_rank, 2):
        assert "scores reach 40" in message and "epsilon" in message
