from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.utils._python_dispatch import TorchDispatchMode

from largescale.methods.losses import swapped_prediction


def drawn(
    views: int, assigned: int, images: int, width: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(views + images)
    scores = torch.rand(views, images, width, generator=generator, dtype=torch.float64) * 2 - 1
    codes = (torch.randn(assigned, images, width, generator=generator, dtype=torch.float64) * 3).softmax(-1)
    return scores.to(dtype).requires_grad_(), codes.to(dtype)


def naive(scores: Tensor, codes: Tensor, temperature: float) -> Tensor:
    loss = scores.new_zeros(())
    for a in range(len(codes)):
        for v in range(len(scores)):
            if v != a:
                loss = loss - (codes[a] * log_softmax(scores[v] / temperature, dim=-1)).sum(-1).mean()
    return loss / len(codes) / (len(scores) - 1)


@pytest.mark.parametrize(
    "views, assigned, images, width",
    [(2, 2, 6, 5), (5, 2, 7, 3), (4, 3, 1, 9), (3, 2, 40, 2000)],  # the last: in several blocks
)
def test_loss_and_gradient_equal_the_naive_loop(views, assigned, images, width):
    scores, codes = drawn(views, assigned, images, width)
    ours, theirs = swapped_prediction(scores, codes, 0.1), naive(scores, codes, 0.1)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    (mine,), (expected,) = (torch.autograd.grad(3 * loss, scores) for loss in (ours, theirs))
    torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-15)


def test_rows_of_codes_need_not_sum_to_one_exactly():
    scores, codes = drawn(4, 2, 5, 6)
    ours, theirs = swapped_prediction(scores, codes * 1.01, 0.1), naive(scores, codes * 1.01, 0.1)
    (mine,), (expected,) = (torch.autograd.grad(loss, scores) for loss in (ours, theirs))
    torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-15)


def test_large_scores_neither_overflow_nor_lose_the_gradient():
    scores, codes = drawn(3, 2, 4, 6, torch.float32)
    loss = swapped_prediction(scores * 1000, codes, 0.01)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss.isfinite() and gradient.isfinite().all() and gradient.abs().sum() > 0


def test_low_precision_is_computed_in_float32_under_autocast():
    scores, codes = drawn(3, 2, 4, 6, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = swapped_prediction(scores, codes, 0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), naive(scores.double(), codes.double(), 0.1), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient.dtype == torch.bfloat16


def test_codes_get_no_gradient_and_the_gradient_is_taken_once():
    scores, codes = drawn(3, 2, 4, 6)
    codes.requires_grad_()
    loss = swapped_prediction(scores, codes, 0.1)
    loss.backward(retain_graph=True)
    assert codes.grad is None
    with pytest.raises(RuntimeError, match="already taken"):
        loss.backward()


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor, and in all tensors as large as the scores together, that operators return."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.whole, self.storages = scores.numel(), {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        for one in (found,) if isinstance(found, Tensor) else ():
            storage = one.untyped_storage()
            if storage.nbytes() >= self.whole * one.element_size():
                self.storages[storage.data_ptr()] = one
        return found


def test_nothing_as_large_as_the_scores_is_made_but_their_gradient():
    scores, codes = drawn(4, 2, 64, 5000, torch.float32)
    with Largest(scores) as made:
        loss = swapped_prediction(scores, codes, 0.1)
        (gradient,) = torch.autograd.grad(loss, scores)
    assert set(made.storages) - {scores.untyped_storage().data_ptr()} == {gradient.untyped_storage().data_ptr()}


def test_without_a_gradient_nothing_is_kept():
    scores, codes = drawn(4, 2, 64, 5000, torch.float32)
    with torch.no_grad(), Largest(scores) as made:
        swapped_prediction(scores, codes, 0.1)
    assert set(made.storages) <= {scores.untyped_storage().data_ptr()}


def test_in_one_block_the_bits_are_those_of_the_written_form():
    scores, codes = drawn(6, 2, 8, 7, torch.float32)
    log_p = log_softmax(scores / 0.1, dim=-1)
    written = -(codes * (log_p.sum(0) - log_p[:2])).sum() / (2 * 5 * 8)
    ours = swapped_prediction(scores, codes, 0.1)
    (mine,), (expected,) = (torch.autograd.grad(loss, scores) for loss in (ours, written))
    assert torch.equal(ours, written) and torch.equal(mine, expected)
