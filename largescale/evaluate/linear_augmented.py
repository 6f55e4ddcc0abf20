"""Linear probe on augmented images, the published protocol: frozen trunk, random resized crops and flips.

SwAV's (arXiv 2006.09882, its eval_linear.py): the trunk in evaluation mode, SGD with momentum 0.9 and a cosine
schedule, a rate of 0.3 per 256 images, weight decay 1e-6, 100 epochs; the last epoch is measured, not the best one, on
centre crops. Features are not standardised. Another protocol than `linear` and `linear-cached`, which see no
augmentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from largescale.config import EvaluateConfig
from largescale.config.setting import setting
from largescale.evaluate.image_training import Trial, accuracies, trained_scores
from largescale.evaluate.training_recipe import Recipe

CHOSEN_ON = "nothing; the rate is given and the last epoch is measured"


@dataclass
class Settings(EvaluateConfig):
    """Keys under `evaluate`."""

    linear_augmented_epochs: int = setting(
        100, "Epochs of the linear probe on augmented images.", at_least=1, at_most=10**6, free=True
    )
    linear_augmented_batch: int = setting(
        256, "Images per step of it, over all ranks.", at_least=1, at_most=2**31, free=True
    )
    linear_augmented_rate: float = setting(
        0.3, "Its learning rate per 256 images; falls along a cosine.", above=0, at_most=1e9, free=True
    )
    linear_augmented_weight_decay: float = setting(1e-6, "Its weight decay.", at_least=0, at_most=1e6, free=True)


def measure(trial: Trial, config: Settings) -> dict[str, Any]:
    """Top-1 (and top-5) accuracy after the last epoch. Collectives: those of `trained_scores`."""
    recipe = Recipe(
        epochs=config.linear_augmented_epochs,
        batch=config.linear_augmented_batch,
        batch_key="evaluate.linear_augmented_batch",
        trunk_rate=0.0,
        head_rate=config.linear_augmented_rate,
        weight_decay=config.linear_augmented_weight_decay,
    )
    return accuracies(trained_scores(trial, recipe))
