"""Symptoms by signs that all methods share: what images and views have to offer, and whether embeddings show it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from largescale.config import Config
from largescale.methods.symptom import Row, Symptom

_BLANK = 0.02
"""Spread below which images are all alike: with `data.std` near the images' own, a hundredth of their contrast."""
_EQUAL = 0.98
"""Agreement above which views are all but equal."""
_UNRELATED = 0.1
"""Agreement below which views of one image may as well be of two: images are all the same, or augmentation leaves
nothing in common. By itself no alarm, since small crops of real images have little in common pixel by pixel."""

_OTHER_IMAGES = (
    "There is nothing to tell them apart by: look at the images in the report, and check data.shards, data.mean and "
    "data.std (`shards info`)"
)

BY_IMAGES = [
    Symptom(
        "images all the same",
        sign=lambda row: row.get("pixel_spread"),
        sick=(0, _BLANK),
        recovery="up",
        seen=lambda row: f"a pixel hardly differs between images (spread {row['pixel_spread']:.2g})",
        meaning="all images look the same",
        remedy=_OTHER_IMAGES,
    ),
    Symptom(
        "views identical",
        sign=lambda row: row.get("pixel_agreement"),
        sick=(_EQUAL, math.inf),
        recovery="down",
        seen=lambda row: f"two views of an image have {row['pixel_agreement']:.1%} of their pixels' variance in common",
        meaning="augmentation hardly changes anything, so the task is to tell equal pictures from others",
        remedy="Use, in another run.dir, a smaller data.crops scale or more data.augment (jitter, blur, erase, flip)",
    ),
]
"""What images alone tell, at any time of a run."""

SAME = Symptom(
    "images all the same",
    sign=lambda row: row.get("pixel_agreement"),
    sick=(-math.inf, _UNRELATED),
    recovery="up",
    seen=lambda row: "views of one image differ as much as those of two",
    meaning="either all images are the same, or augmentation leaves nothing of them",
    remedy=f"{_OTHER_IMAGES}; if they do differ, use, in another run.dir, a larger data.crops scale and less of "
    "data.augment",
)
"""What images tell where a run has gone wrong, and its embeddings tell no images apart either."""
PERHAPS_SAME = (
    "Views of one image have hardly a pixel in common, as strong crops of photographs do, but also images that are all "
    "the same: look at them in the report, and check data.shards"
)
"""What is added to another diagnosis where pixels alone say so."""
_STRANGERS = 0.05
"""How much closer, of what is possible, two views of an image must be than those of two images."""
_MILDER = "less of data.augment and a larger smallest data.crops scale"
_ONE_PLACE = 0.05
"""Distance from 1 of the cosine of two images below which there is nothing to compare."""


def not_told_apart(config: Config) -> Symptom:
    """Views of one image whose embeddings are as far apart as those of two: the run learns nothing of images."""
    return Symptom(
        "images not told apart",
        sign=closer_than_chance,
        sick=(-math.inf, _STRANGERS),
        recovery="up",
        seen=lambda row: (
            f"two views of an image (cosine {row['agreement']:.2f}) are no closer than those of two images "
            f"({row['agreement_of_others']:.2f})"
        ),
        meaning="nothing is learnt of them",
        remedy=f"Try, in another run.dir, {_MILDER}, so that views have something in common, or "
        f"optim.lr={config.optim.lr / 2:.2g}",
        by_rate=True,
        besides_rate=_MILDER,
    )


def closer_than_chance(row: Row) -> float | None:
    """How much closer embeddings of two views of an image are than those of two images, as a share of what is possible.
    None if all are nearly equal, or if a line lacks the signs.
    """
    own, others = row.get("agreement"), row.get("agreement_of_others")
    if own is None or others is None or 1 - others < _ONE_PLACE:
        return None
    return float((own - others) / (1 - others))


def never_told_apart(rows: Sequence[Row]) -> bool:
    """Whether embeddings of two views of an image are no closer than chance, by all lines together that can tell."""
    values = [value for row in rows if (value := closer_than_chance(row)) is not None]
    return bool(values) and float(np.mean(values)) <= _STRANGERS


def little_in_common(rows: Sequence[Row]) -> bool:
    """Whether views of one image hardly agree more than those of two, by all lines together: one line's few images
    vary.
    """
    values = [value for row in rows if (value := SAME.sign(row)) is not None]
    if len(values) < 2:
        return False
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)) + 2 * error <= SAME.sick[1]
