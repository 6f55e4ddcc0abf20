"""How much images differ in pixels, and two views of one: whether there is anything to learn from them.

Two signs are logged, of the rank that logs: `pixel_spread`, the standard deviation of a pixel over images and views,
and `pixel_agreement`, the share of its variance that two views of an image have in common.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from largescale.config.data_settings import CropGroup
from largescale.data.views import Views


def pixel_signs(views: Views, groups: Sequence[CropGroup], *, of_frames: bool = False) -> dict[str, float]:
    """`pixel_spread` and `pixel_agreement` of this rank's batch; empty for one image, or without two views of one size.

    Args:
        views: of this rank's part of a batch.
        groups: as configured; the first two views of equal size are compared, be they of one group or of two.
        of_frames: whether views are frames of a clip, which may be alike, so that their agreement says nothing.
    """
    batch = len(views.ids)
    if batch < 2:
        return {}
    first: dict[int, Tensor] = {}
    for group, images in zip(groups, views.images, strict=True):
        for view in images.split(batch)[: min(2, group.num)]:
            if group.size in first:
                spread, agreement = between_and_within(first[group.size], view)
                return {"pixel_spread": spread, **({} if of_frames else {"pixel_agreement": agreement})}
            first[group.size] = view
    return {}


def between_and_within(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Standard deviation of a pixel over views, and the share of its variance that views of an image have in common.

    The latter is the intraclass correlation ICC(1) of one-way analysis of variance (Shrout and Fleiss 1979): near 0
    where views of one image differ as much as views of two, 1 where they are equal; 1 as well if all views are.

    Args:
        first, second: views of the same images [B, C, H, W].
    """
    first, second = first.detach().float(), second.detach().float()
    means = (first + second) / 2
    between = 2 * (means - means.mean(0)).square().mean() * len(first) / (len(first) - 1)
    within = (first - second).square().mean() / 2
    total = float(between + within)
    return (total / 2) ** 0.5, float(between - within) / total if total > 0 else 1.0
