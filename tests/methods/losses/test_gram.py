from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from largescale.methods.losses import cross_correlation, variance_covariance
from largescale.methods.losses.gram import square_of_product
from largescale.plan import trace
from tests.methods.losses.loops import assert_same


@pytest.mark.parametrize("num, width", [(6, 9), (9, 6), (7, 7)])
def test_both_forms_are_the_sum_of_squares_of_the_product(num, width):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, num, width, generator=generator, dtype=torch.float64)
    for other in (a, b):
        expected = (a.T @ other).square().sum()
        for form in ("direct", "gram", "auto"):
            torch.testing.assert_close(square_of_product(a, other, None, form), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", [cross_correlation, variance_covariance])
def test_gram_matrices_give_the_loss_and_gradient_of_the_direct_form(loss):
    views = torch.randn(2, 12, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_same(lambda z: loss(*z, form="gram"), lambda z: loss(*z, form="direct"), views)


def largest_saved(num: int, width: int) -> int:
    """Numbers in the largest tensor that the loss keeps for its gradient."""
    sizes = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    views = torch.randn(2, num, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        cross_correlation(*views)
    return max(sizes)


def test_the_smaller_matrix_is_chosen():
    """A batch of 16 and 256 dimensions: nothing as large as 256 x 256 is kept."""
    assert largest_saved(16, 256) <= 16 * 2 * 256
    assert largest_saved(256, 16) <= 256 * 2 * 16


def held_gb(loss, form, ranks):
    """Most that a rank holds beyond the embeddings, of 2048 images in 8192 dimensions, counted on fake tensors."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with FakeTensorMode():
            views = torch.empty(2, 2048 // ranks, 8192).requires_grad_()
            counted = trace.StepTrace()
            counted.watch(iter([views]))
            with counted:
                loss(*views, form=form, group=dist.group.WORLD if ranks > 1 else None).backward()
            return (counted.lap() - views.nbytes) / 1e9
    finally:
        dist.destroy_process_group()


def test_memory_is_what_is_said(monkeypatch):
    """In the docstrings, in GB."""
    monkeypatch.setattr(trace, "_SWEEP_EVERY", 1)
    said = {
        cross_correlation: {("direct", 1): 1.5, ("gram", 1): 0.7, ("direct", 8): 0.7, ("gram", 8): 0.7},
        variance_covariance: {("direct", 1): 1.6, ("gram", 1): 0.55, ("direct", 8): 0.45, ("gram", 8): 0.42},
    }
    for loss, cases in said.items():
        for (form, ranks), expected in cases.items():
            assert held_gb(loss, form, ranks) == pytest.approx(expected, rel=0.05), (loss.__name__, form, ranks)
