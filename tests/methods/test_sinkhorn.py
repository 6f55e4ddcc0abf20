from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from largescale.methods.sinkhorn import sinkhorn
from tests.helpers.codes import cosines, oracle


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(1, 60),
    num_prototypes=st.integers(2, 40),
    seed=st.integers(0, 99),
    epsilon=st.floats(0.01, 0.5),
    iterations=st.integers(1, 60),
)
def test_equals_the_float64_oracle(num_rows, num_prototypes, seed, epsilon, iterations):
    scores = cosines(num_rows, num_prototypes, seed)
    codes = sinkhorn(scores, epsilon=epsilon, iterations=iterations)
    assert codes.dtype == torch.float32
    torch.testing.assert_close(codes.double(), oracle(scores, epsilon, iterations), rtol=0, atol=1e-5)
    torch.testing.assert_close(codes.sum(-1), torch.ones(num_rows), rtol=0, atol=1e-5)


@pytest.mark.parametrize("epsilon", [0.05, 0.03, 0.01, 0.005, 0.002])
def test_extreme_cosines_neither_overflow_nor_lose_a_prototype(epsilon):
    scores = torch.rand(64, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scores[:, 0] = -1
    scores[:, 1] = 1
    scores[0] = -1
    codes = sinkhorn(scores, epsilon=epsilon, iterations=3)
    torch.testing.assert_close(codes.double(), oracle(scores, epsilon, 3), rtol=0, atol=2e-5)


def test_float64_stays_float64():
    scores = cosines(30, 12, 0).double()
    codes = sinkhorn(scores, epsilon=0.05, iterations=3)
    assert codes.dtype == torch.float64
    torch.testing.assert_close(codes, oracle(scores, 0.05, 3), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_scores_are_computed_in_float32_under_autocast(dtype):
    scores = cosines(30, 12, 0).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        codes = sinkhorn(scores, epsilon=0.03, iterations=3)
    assert codes.dtype == torch.float32
    torch.testing.assert_close(codes.double(), oracle(scores, 0.03, 3), rtol=0, atol=1e-5)


def test_packed_problems_are_independent():
    scores = torch.stack([cosines(20, 8, seed) for seed in range(3)])
    packed = sinkhorn(scores, epsilon=0.05, iterations=3)
    for problem, codes in zip(scores, packed, strict=True):
        assert torch.equal(sinkhorn(problem, epsilon=0.05, iterations=3), codes)


def test_many_iterations_use_prototypes_equally():
    codes = sinkhorn(cosines(500, 10, 1), epsilon=0.2, iterations=200)
    torch.testing.assert_close(codes.sum(0), torch.full((10,), 50.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("epsilon", [0.2, 0.01])
def test_prototypes_are_used_as_a_prior_says(epsilon):
    scores, shares = cosines(300, 6, 2).double(), torch.tensor([0.4, 0.3, 0.1, 0.1, 0.05, 0.05], dtype=torch.float64)
    codes = sinkhorn(scores, epsilon=epsilon, iterations=3, prior=shares)
    torch.testing.assert_close(codes, oracle(scores, epsilon, 3, shares), rtol=0, atol=1e-13)
    equal = sinkhorn(scores, epsilon=epsilon, iterations=3, prior=torch.full((6,), 1 / 6, dtype=torch.float64))
    torch.testing.assert_close(equal, sinkhorn(scores, epsilon=epsilon, iterations=3), rtol=0, atol=1e-13)
    many = sinkhorn(scores, epsilon=0.2, iterations=300, prior=shares)
    torch.testing.assert_close(many.mean(0), shares, rtol=1e-6, atol=0)


def test_the_scores_are_left_as_they_were():
    scores = cosines(20, 8, 0)
    before = scores.clone()
    sinkhorn(scores, epsilon=0.05, iterations=3)
    assert torch.equal(scores, before)


def test_no_iterations_is_an_error():
    with pytest.raises(ValueError, match="iterations=0"):
        sinkhorn(cosines(4, 4, 0), epsilon=0.05, iterations=0)
