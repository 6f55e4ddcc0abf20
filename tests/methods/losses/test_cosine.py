from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from largescale.methods.losses import cosine


def drawn(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def naive(p: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    terms = [
        1 - cosine_similarity(p[v, i], t[a, i], dim=0)
        for a in range(len(t))
        for v in range(len(p))
        for i in range(p.shape[1])
        if v != a
    ]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("num, large", [(2, 2), (5, 2), (4, 3)])
def test_equals_the_naive_loop(num, large):
    p, t = drawn(num, 6, 4), drawn(large, 6, 4)
    ours, theirs = cosine(p, t), naive(p, t)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for mine, expected in zip(torch.autograd.grad(ours, (p, t)), torch.autograd.grad(theirs, (p, t)), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-14)


def test_is_bounded_and_does_not_see_lengths():
    z = drawn(2, 6, 4).detach()
    assert float(cosine(z.flip(0), z)) == pytest.approx(0, abs=1e-12)
    assert float(cosine(-z.flip(0), z)) == pytest.approx(2)
    torch.testing.assert_close(cosine(3 * drawn(2, 6, 4), 0.1 * z), cosine(drawn(2, 6, 4), z), rtol=1e-12, atol=0)


def test_is_computed_in_float32_under_autocast():
    z = drawn(2, 6, 4).detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert cosine(z, z).dtype == torch.float32
