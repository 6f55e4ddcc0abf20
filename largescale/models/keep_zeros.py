"""Training that leaves at zero what is zero: for pruned networks whose masks are in their weights alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def keep_zeros(network: nn.Module) -> None:
    """Drop the gradients of matrices' and kernels' elements that are zero now; without momentum from before, an
    optimizer does not move them then, whatever its weight decay. Biases and normalisation are trained as ever.
    """
    for parameter in network.parameters():
        kept = parameter.detach() != 0
        if parameter.dim() > 1 and not bool(kept.all()):
            parameter.register_hook(_Masked(kept))


class _Masked:
    """A gradient's hook."""

    def __init__(self, kept: Tensor) -> None:
        self._kept = kept

    def __call__(self, gradient: Tensor) -> Tensor:
        return torch.mul(gradient, self._kept)
