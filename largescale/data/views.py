"""What a method sees of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

FACTS = ("boxes", "flips")
"""What a method may ask for, by `facts` of its settings."""


class Views(NamedTuple):
    """The views of this rank's part of a batch, or of one of its micro-batches. There are no labels in it.

    A tuple, since FSDP2 looks for the tensors to cast in tuples but not in data classes.

    Attributes:
        images: augmented, one tensor [num * B, 3, S, S] per crop group, view after view.
        ids: which samples they show, int64 [B]; the same number is the same image in every epoch.
        facts: what the method asked for, where V counts the views of all groups. `boxes`, int64 [V, B, 4]: top, left,
            height and width of each view in the upright image, in its pixels. `flips`, bool [V, B]: which are mirrored.
    """

    images: list[Tensor]
    ids: Tensor
    facts: Mapping[str, Tensor] = MappingProxyType({})

    @staticmethod
    def numbered(images: list[Tensor], batch: int, facts: Sequence[str] = ()) -> Views:
        """Views of samples 0, 1, ... `batch` - 1, for plans and benchmarks, which have no stream; with facts that only
        have the right form.
        """
        device, num_views = images[0].device, sum(map(len, images)) // batch
        empty = {
            "boxes": torch.ones(num_views, batch, 4, dtype=torch.int64, device=device),
            "flips": torch.zeros(num_views, batch, dtype=torch.bool, device=device),
        }
        return Views(images, torch.arange(batch, device=device), {name: empty[name] for name in facts})
