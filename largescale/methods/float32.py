"""The least precision that losses are computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(z: Tensor) -> Tensor:
    """The same numbers in float32, or in float64 if they are."""
    return z if z.dtype == torch.float64 else z.float()
