"""What a method sees of a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Views(NamedTuple):
    """The views of this rank's part of a batch, or of one of its micro-batches. There are no labels in it.

    A tuple, since FSDP2 looks for the tensors to cast in tuples but not in data classes.

    Attributes:
        images: augmented, one tensor [num * B, 3, S, S] per crop group, view after view.
        ids: which samples they show, int64 [B]; the same number is the same image in every epoch.
    """

    images: list[Tensor]
    ids: Tensor

    @staticmethod
    def numbered(images: list[Tensor], batch: int) -> Views:
        """Views of samples 0, 1, ... `batch` - 1, for plans and benchmarks, which have no stream."""
        return Views(images, torch.arange(batch, device=images[0].device))
