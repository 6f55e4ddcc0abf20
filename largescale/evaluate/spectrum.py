"""What can be said of features without labels. An alarm and a tie-breaker within one method, not an accuracy.

The spectrum of features X [N, D] (rows x_i), by singular values s_j:

    effective rank   exp(-sum p_j log p_j), p_j = s_j / sum s + 1e-7 (RankMe, arXiv 2210.02885), of X as it is and of X
                     less its mean: alone, the first sees a shared vector as one more direction, the second not at all
    share of the mean   |mean x|^2 / mean |x|^2: near 1, all images have the same features
    alpha            - slope of log l_j over log j for j = 10 ... 100, least squares, where l_j are the eigenvalues of
                     the covariance (alpha-ReQ, NeurIPS 2022); near 1 is good, but not after a collapse
    uniformity       log mean exp(-2 |u_i - u_j|^2) over pairs of images, u = x / |x| (arXiv 2005.10242); lower is wider

and of features of several views of each image, [V, N, D]:

    alignment        mean |u_i - u_i'|^2 over pairs of views of an image (arXiv 2005.10242)
    LiDAR            effective rank, by eigenvalues, of W^-1/2 B W^-1/2, where B is the covariance of the images' means
                     and W that of views around these, plus 1e-4 (arXiv 2312.04000)

All depend on the number of images and on the layer: compare like with like.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from largescale.config import EvaluateConfig
from largescale.config.setting import setting
from largescale.evaluate.feature_set import FeatureSet
from shards.ground.errors import InputError

_FLOOR = 1e-7
"""Added to shares, as in RankMe."""

_WITHIN = 1e-4
"""Added to the covariance within images, as in LiDAR."""

_FIRST_RANK, _LAST_RANK, _FEWEST_RANKS = 10, 100, 10
_PAIRED = 2048
"""Images of which all pairs are compared."""

_CHUNK = 8192
CHOSEN_ON = "nothing is chosen"


@dataclass
class Settings(EvaluateConfig):
    """Keys under `evaluate`."""

    spectrum_images: int = setting(
        25600, "Images that the spectrum of features is computed of; 0 takes all.", at_least=0, at_most=2**31, free=True
    )
    spectrum_views: int = setting(
        0,
        "Augmented views per image, for alignment and LiDAR; 0 leaves these out.",
        at_least=0,
        at_most=1000,
        free=True,
    )
    spectrum_view_images: int = setting(
        1000,
        "Images of which there are views.",
        at_least=2,
        at_most=10**6,
        free=True,
        used_if="evaluate.spectrum_views",
    )


def chosen_images(total: int, config: Settings) -> tuple[Tensor, Tensor, int]:
    """Positions of the images that are measured, of those that there are views of, and the number of views.

    Raises:
        InputError: a single view, which has nothing to agree with.
    """
    if config.spectrum_views == 1:
        raise InputError("evaluate.spectrum_views=1: expected 0 for none, or at least 2 (LiDAR's authors use 10 to 50)")
    viewed = config.spectrum_view_images if config.spectrum_views else 0
    return spread(total, config.spectrum_images or total), spread(total, viewed), config.spectrum_views


def measure(train: FeatureSet, views: Tensor | None, config: Settings) -> dict[str, Any]:
    """The measures of the training images' features; labels take no part.

    Args:
        train: features.
        views: features of views of some of the images, [V, N, D]; None leaves alignment and LiDAR out.
        config: settings.

    Raises:
        InputError: fewer than two images.
    """
    features = train.features
    if len(features) < 2:
        raise InputError(f"spectrum: {len(features)} training image; needs at least 2")
    if 0 < config.spectrum_images < len(features):
        features = features[spread(len(features), config.spectrum_images)]
    found = {**spectrum(features), "num_images": len(features)}
    if views is not None and views.shape[1] > 1:
        num_views, num_images, _ = views.shape
        found |= {"alignment": alignment(views), "lidar": lidar(views)}
        found |= {"num_views": num_views, "num_view_images": num_images}
    return found


def spectrum(features: Tensor) -> dict[str, float]:
    """All measures of features [N, D] that need no views; what is not defined of them is left out."""
    if len(features) < 2 or not features.isfinite().all():
        return {}
    total, mean = _second_moment(features)
    centred = total - torch.outer(mean, mean)
    eigenvalues, centred_eigenvalues = _eigenvalues(total), _eigenvalues(centred)
    power = float(total.diagonal().sum())
    if power == 0:
        return {}
    found = {
        "effective_rank": effective_rank(eigenvalues.sqrt()),
        "effective_rank_centred": effective_rank(centred_eigenvalues.sqrt()),
        "mean_share": float(mean.square().sum()) / power,
        "alpha": alpha(centred_eigenvalues[: len(features) - 1]),
        "uniformity": uniformity(features),
    }
    return {name: value for name, value in found.items() if value == value}


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the values' shares; NaN if all are 0."""
    if not float(values.sum()) > 0:
        return float("nan")
    shares = values / values.sum() + _FLOOR
    return float(torch.exp(-(shares * shares.log()).sum()))


def alpha(eigenvalues: Tensor) -> float:
    """The exponent by which descending eigenvalues fall between ranks 10 and 100; NaN if there are too few."""
    kept = eigenvalues[_FIRST_RANK - 1 : _LAST_RANK].double()
    kept = kept[kept > 1e-12 * eigenvalues[0]] if len(kept) else kept
    if len(kept) < _FEWEST_RANKS:
        return float("nan")
    x = torch.arange(_FIRST_RANK, _FIRST_RANK + len(kept), dtype=torch.float64, device=kept.device).log()
    x, y = x - x.mean(), kept.log()
    return -float((x * (y - y.mean())).sum() / x.square().sum())


def uniformity(features: Tensor) -> float:
    """log mean exp(-2 d^2) over all pairs of (at most 2,048) images, evenly spread."""
    units = normalize(features[spread(len(features), _PAIRED)].double(), dim=1)
    squares = (2 - 2 * units @ units.T).clamp_min(0)
    above = torch.ones_like(squares, dtype=torch.bool).triu(1)
    return float(torch.exp(-2 * squares[above]).mean().log())


def alignment(views: Tensor) -> float:
    """Mean squared distance of the unit features of two views of an image; views [V, N, D] with V of at least 2."""
    units = normalize(views.double(), dim=2)
    num_views = len(units)
    # Over ordered pairs of different views: |u - u'|^2 = 2 - 2 u u', and the sum over all u' is one vector.
    sums = units.sum(0).square().sum(1) - num_views
    return 2 - 2 * float(sums.mean()) / (num_views * (num_views - 1))


def lidar(views: Tensor) -> float:
    """LiDAR of views [V, N, D], each image a class of its own."""
    views = views.double()
    means = views.mean(0)
    between = _covariance(means - means.mean(0))
    within = _covariance((views - means).flatten(0, 1))
    within.diagonal().add_(_WITHIN)
    values, vectors = torch.linalg.eigh(within)
    whitening = (vectors * values.rsqrt()) @ vectors.T
    return effective_rank(_eigenvalues(whitening @ between @ whitening))


def _second_moment(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of x x' [D, D] and of x [D], float64."""
    width = features.shape[1]
    total = torch.zeros(width, width, dtype=torch.float64, device=features.device)
    mean = torch.zeros(width, dtype=torch.float64, device=features.device)
    for some in features.split(_CHUNK):
        rows = some.double()
        total += rows.T @ rows
        mean += rows.sum(0)
    return total / len(features), mean / len(features)


def _covariance(centred: Tensor) -> Tensor:
    return centred.T @ centred / len(centred)


def _eigenvalues(symmetric: Tensor) -> Tensor:
    """In descending order, none below 0."""
    return torch.linalg.eigvalsh((symmetric + symmetric.T) / 2).flip(0).clamp_min(0)


def spread(num: int, wanted: int) -> Tensor:
    """At most `wanted` of `num` positions, evenly spread: shards need not be shuffled."""
    return torch.arange(num) if num <= wanted else (torch.arange(wanted) * num) // wanted
