"""Views that predict what other views of their image are assigned to, in the memory of one gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax

_NUMBERS = {"cpu": 2**18, "cuda": 2**26}
"""Scores in a block, by type of device: 1 MB in float32, which a processor's cache holds, and 256 MB."""


def swapped_prediction(scores: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each view's prediction with the codes of every other view of its image, on average.

    The naive loop::

        for a in range(A):
            for v in range(V):
                if v != a:
                    loss += -(codes[a] * log_softmax(scores[v] / temperature)).sum(-1).mean()
        loss /= A * (V - 1)

    Log-probabilities take as much memory as scores, and so do four more tensors on the way there and back. Here a block
    of images goes all the way, so beside scores and codes there is but the gradient. It is made along with the loss,
    and cannot be differentiated again. In float32 at least, outside autocast.

    Args:
        scores: of V views of B images with K prototypes, outputs or classes [V, B, K].
        codes: shares that sum to 1, of the first A of these views [A, B, K]; they get no gradient.
        temperature: divides scores.

    Source: SwAV, arXiv 2006.09882, equations 1 and 2; DINO, arXiv 2104.14294, equation 3, with the outputs of the
    teacher as codes.

    Collectives: none; the mean over ranks of their losses is that of all images.
    """
    with_gradient = torch.is_grad_enabled() and scores.requires_grad
    return _SwappedPrediction.apply(scores, codes.detach(), temperature, with_gradient)


class _SwappedPrediction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, codes: Tensor, temperature: float, with_gradient: bool) -> Tensor:
        precision = torch.promote_types(scores.dtype, torch.float32)
        num_views, num_images, width = scores.shape
        num_assign = len(codes)
        num_terms = num_assign * (num_views - 1) * num_images
        gradient = torch.empty_like(scores) if with_gradient else None
        loss = scores.new_zeros((), dtype=precision)
        with torch.autocast(scores.device.type, enabled=False):
            for images in _blocks(num_images, num_views * width, scores.device):
                q = codes[:, images].to(precision)
                log_p = log_softmax(scores[:, images].to(precision) / temperature, dim=-1)
                # The other views of view a are all views less itself.
                loss -= (q * (log_p.sum(0) - log_p[:num_assign])).sum() / num_terms
                if gradient is not None:
                    # Step by step as autograd would, so that the written form gives the same bits.
                    share = q * (-1 / num_terms)
                    of_log_p = share.sum(0).expand_as(log_p).clone()
                    of_log_p[:num_assign] -= share
                    found = torch.ops.aten._log_softmax_backward_data(of_log_p, log_p, -1, precision)
                    gradient[:, images] = found / temperature
        ctx.gradient = gradient
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.gradient is None:
            raise RuntimeError("swapped_prediction: the gradient was already taken, and is kept for one backward pass")
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(outer.to(gradient.dtype)), None, None, None


def _blocks(num_images: int, numbers_per_image: int, device: torch.device) -> list[slice]:
    size = max(1, _NUMBERS.get(device.type, _NUMBERS["cuda"]) // numbers_per_image)
    return [slice(start, start + size) for start in range(0, num_images, size)]
