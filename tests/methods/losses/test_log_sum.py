from __future__ import annotations

import math

import pytest
import torch

from largescale.methods.losses import log_sum
from largescale.methods.losses.log_sum import log_sum_exp
from largescale.methods.losses.picks import among_others


def drawn(queries: int, candidates: int, width: int = 5, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(queries)
    rows = [torch.randn(num, width, generator=generator, dtype=torch.float64) for num in (queries, candidates)]
    return rows[0].to(dtype).requires_grad_(), rows[1].to(dtype)


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    if request.param == "many blocks":
        monkeypatch.setitem(log_sum._ROWS, "cpu", 3)
        monkeypatch.setitem(log_sum._NUMBERS, "cpu", 7)


@pytest.mark.parametrize("excluded", [None, [0, 10, -1, 4, 11, 5, 99]])
def test_sum_largest_and_gradient_equal_those_of_all_products(blocks, excluded):
    queries, candidates = drawn(7, 11)
    products = queries @ candidates.T
    places = None if excluded is None else torch.tensor(excluded)
    for row, place in enumerate(excluded or []):
        if 0 <= place < 11:
            mask = torch.zeros(7, 11, dtype=torch.bool)
            mask[row, place] = True
            products = products.masked_fill(mask, -math.inf)
    found = log_sum_exp(queries, candidates, places)
    torch.testing.assert_close(found.log_sum, products.logsumexp(1), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.largest, products.amax(1), rtol=1e-13, atol=1e-13)
    outer = torch.linspace(-2, 3, 7, dtype=torch.float64)
    (mine,), (theirs,) = (torch.autograd.grad(s, queries, outer) for s in (found.log_sum, products.logsumexp(1)))
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def test_large_products_neither_overflow_nor_lose_the_gradient(blocks):
    queries, candidates = drawn(4, 9, dtype=torch.float32)
    found = log_sum_exp(queries * 1e4, candidates)
    (gradient,) = torch.autograd.grad(found.log_sum.sum(), queries)
    torch.testing.assert_close(found.log_sum, (queries * 1e4 @ candidates.T).logsumexp(1))
    assert gradient.isfinite().all() and bool((gradient.abs().sum(1) > 0).all())


def test_a_query_without_candidates_costs_nothing(blocks):
    queries, candidates = drawn(3, 1)
    found = log_sum_exp(queries, candidates, torch.tensor([0, 5, 0]))
    (gradient,) = torch.autograd.grad(torch.logaddexp(found.log_sum, torch.ones(3)).sum(), queries)
    assert found.log_sum[0] == found.largest[2] == -math.inf
    assert gradient[[0, 2]].abs().sum() == 0 and gradient[1].abs().sum() > 0


def test_the_gradient_serves_one_backward_pass():
    queries, candidates = drawn(3, 4)
    total = log_sum_exp(queries, candidates).log_sum.sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already taken"):
        total.backward()


def test_candidates_that_are_learnt_get_their_gradient():
    queries, others = drawn(6, 8)
    others.requires_grad_()
    keys = queries.detach()[:3]
    learnt, fixed = (among_others(queries, keys, some, 0.2) for some in (others, others.detach()))
    torch.testing.assert_close(learnt.loss(), fixed.loss())
    assert learnt.picked() == fixed.picked()
    (gradient,) = torch.autograd.grad(learnt.loss(), others)
    assert bool((gradient.abs().sum(1) > 0).all())


def test_products_are_never_held_all_at_once():
    rows, candidates, width = 512, 2**16, 4
    queries = torch.randn(rows, width, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            nonlocal largest
            result = function(*arguments, **(options or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        log_sum_exp(queries, torch.randn(candidates, width)).log_sum.sum().backward()
    assert largest == candidates * width  # of the candidates themselves; the products would be 2**25 numbers
