"""Views of several sizes: the large ones show most of an image, and may be what the others are compared with."""

from __future__ import annotations

from itertools import groupby, takewhile

import torch
from torch import Tensor

from largescale.config import Config, CropGroup, require
from largescale.data.views import Views


def each_view(views: Views) -> list[Tensor]:
    """One tensor [B, 3, S, S] per view, whether they are of one crop group or of several.

    Published code of methods without negatives passes views one by one, so that BatchNorm sees one view at a time.
    """
    return [view for group in views.images for view in group.split(len(views.ids))]


def by_size(groups: list[Tensor]) -> list[Tensor]:
    """Views [V * B, 3, S, S] of crop groups; those of groups of one size, one behind the other, together."""
    runs = [list(same) for _, same in groupby(groups, key=lambda images: images.shape[-1])]
    return [run[0] if len(run) == 1 else torch.cat(run) for run in runs]


def num_sizes(crops: list[CropGroup]) -> int:
    """How many tensors `by_size` makes."""
    return sum(1 for _ in groupby(crops, key=lambda group: group.size))


def num_large(crops: list[CropGroup]) -> int:
    """Number of large views: those of the first group, and of groups of the same size right behind it."""
    return sum(group.num for group in takewhile(lambda group: group.size == crops[0].size, crops))


def require_two_large(config: Config) -> None:
    """Refuse crops without two large views.

    Raises:
        InputError: naming the key.
    """
    large = num_large(config.data.crops)
    require(
        large >= 2,
        "data.crops",
        f"{large} views in the leading groups of one size",
        f"at least two large views with method.name={config.method.name}, such as [{{num: 2, size: 224}}]",
    )
    require_large_first(config)


def require_large_first(config: Config) -> None:
    """Refuse views larger than those of the first group, which the others are compared with.

    Raises:
        InputError: naming the key.
    """
    sizes = [group.size for group in config.data.crops]
    require(
        max(sizes) == sizes[0],
        "data.crops",
        f"groups of {', '.join(map(str, sizes))} px",
        f"the largest first with method.name={config.method.name}: others are compared with the first group's views",
    )


def require_two_views(config: Config) -> None:
    """Refuse crops that are not two views, of one size or of two.

    Raises:
        InputError: naming the key.
    """
    num = sum(group.num for group in config.data.crops)
    require(
        num == 2,
        "data.crops",
        f"{num} views",
        f"two views in all with method.name={config.method.name}, such as [{{num: 2, size: 224}}]",
    )
