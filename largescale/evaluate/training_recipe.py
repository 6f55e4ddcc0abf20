"""How protocols train a network on labelled images: rates, length, views, and what stays frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass

from largescale.evaluate import tuning_optimizer
from shards.ground.errors import InputError

EVEN = 8
"""A batch stays a multiple of this where it can, so that it is the same on 1, 2, 4 and 8 ranks."""


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs, batch: passes over the images, and images per step over all ranks.
        trunk_rate: learning rate of the backbone per 256 images; 0 freezes it, in evaluation mode.
        head_rate: of the classifier.
        weight_decay: of all that is trained.
        drops: shares of the training after which the rate is multiplied by `drop`; empty follows a cosine to 0.
        drop: factor.
        nesterov: whether momentum looks ahead.
        optimizer: a name of `tuning_optimizer`.
        seed: of order, views and the classifier's weights.
        subset: `.npy` of the samples to train on; empty uses all.
        batch_key: the setting that `batch` is of, for messages.
        head_layers: layers of the method's head that stay between backbone and classifier, and are trained like the
            backbone.
        head_layers_key: the setting that these are of, for messages.
        crop_scale: smallest and largest share of an image's area that a view covers.
        flip: probability that a view is mirrored.
        starts_linear: whether the classifier starts from logistic regression on the frozen features, not near 0.
    """

    epochs: int
    batch: int
    trunk_rate: float
    head_rate: float
    weight_decay: float = 0.0
    drops: tuple[float, ...] = ()
    drop: float = 0.1
    nesterov: bool = False
    optimizer: str = tuning_optimizer.SGD_NAME
    seed: int = 0
    subset: str = ""
    batch_key: str = "the protocol's batch"
    head_layers: int = 0
    head_layers_key: str = "the protocol's head layers"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    starts_linear: bool = False


def rate_factor(recipe: Recipe, progress: float) -> float:
    """What learning rates are multiplied by after a share of the training."""
    if not recipe.drops:
        return 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.drop ** sum(progress >= share for share in recipe.drops)


def batch_for(recipe: Recipe, num_images: int, ranks: int) -> int:
    """Images per step: at most the recipe's and those that there are, in equal parts for the ranks.

    Raises:
        InputError: there is not one for each rank.
    """
    most = min(recipe.batch, num_images)
    if most < ranks:
        few = f"{recipe.batch_key}={recipe.batch}" if recipe.batch < ranks else f"{num_images} training images"
        raise InputError(f"{few} for {ranks} ranks: expected at least one image per step for each; start fewer ranks")
    parts = math.lcm(EVEN, ranks)
    return most // parts * parts or most // ranks * ranks
