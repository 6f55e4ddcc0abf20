"""Fine-tuning with 1% or 10% of the labels, with SwAV's settings (arXiv 2006.09882, its eval_semisup.py).

SGD with momentum 0.9, 20 epochs of 256 images, no weight decay, a fifth of the rate after 12 and 16 epochs, BatchNorm
in training mode over all ranks. Rates of trunk and classifier per 256 images: 0.02 and 5 for 1%, 0.01 and 0.2 for 10%.
The splits are those of `low-shot`, stratified and seeded; they are not the published lists of ImageNet. With LARS it
is SimCLRv2's fine-tuning (arXiv 2006.10029), whose epochs are 60 for 1%.

Random crops of 8% to 100% of the area and flips are published for photographs. Small pictures of one thing want views
near those that they are shown in: `low_shot_finetune_crop_scale`, `low_shot_finetune_flip`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largescale.config import EvaluateConfig
from largescale.config.setting import setting
from largescale.evaluate.image_training import Trial, accuracies, labelled, trained_scores
from largescale.evaluate.splits import keep_subset, stratified
from largescale.evaluate.training_recipe import Recipe
from largescale.evaluate.tuning_optimizer import LARS_NAME, PUBLISHED_LARS_RATES, SGD_NAME
from shards.ground.errors import InputError

CHOSEN_ON = "nothing; the rates are given and the last epoch is measured"


@dataclass
class Settings(EvaluateConfig):
    """Keys under `evaluate`."""

    low_shot_finetune_share: float = setting(
        0.01, "Share of the training images to fine-tune on.", above=0, at_most=1, free=True
    )
    low_shot_finetune_split: int = setting(0, "Number of the seeded split.", at_least=0, at_most=2**62, free=True)
    low_shot_finetune_epochs: int = setting(20, "Epochs of low-shot fine-tuning.", at_least=1, at_most=10**6, free=True)
    low_shot_finetune_batch: int = setting(
        256, "Images per step of it, over all ranks.", at_least=1, at_most=2**31, free=True
    )
    low_shot_finetune_rates: list[float] = setting(
        [],
        "Its learning rates of trunk and classifier per 256 images; empty takes the published ones, [0.02, 5] up to 1% "
        "and [0.01, 0.2] above, with LARS [0.04, 0.04].",
        at_least=0,
        at_most=1e9,
        free=True,
    )
    low_shot_finetune_optimizer: str = setting(
        SGD_NAME,
        "What trains the network: `sgd`, with steps of its rate, or `lars` with a cosine, as in "
        "arXiv 2006.10029; momentum 0.9.",
        one_of=(SGD_NAME, LARS_NAME),
        free=True,
    )
    low_shot_finetune_head_layers: int = setting(
        0,
        "Layers of the projection head that stay between backbone and classifier, and are trained like the backbone; "
        "arXiv 2006.10029 keeps 1 of 3. 0 keeps none.",
        at_least=0,
        at_most=100,
        free=True,
    )
    low_shot_finetune_crop_scale: list[float] = setting(
        [0.08, 1.0],
        "Smallest and largest share of an image's area that its views cover.",
        above=0,
        at_most=1,
        length=2,
        ascending=True,
        free=True,
        expected="[smallest, largest] within (0, 1]",
    )
    low_shot_finetune_flip: float = setting(
        0.5, "Probability that a view is mirrored; 0 where left and right matter.", at_least=0, at_most=1, free=True
    )
    low_shot_finetune_linear_first: bool = setting(
        False,
        "Whether the classifier starts from logistic regression on standardised features of the network as it is, with "
        "an L2 strength of 1 (arXiv 2202.10054), rather than near 0.",
        free=True,
    )


def measure(trial: Trial, config: Settings) -> dict[str, Any]:
    """Top-1 (and top-5) accuracy after the last epoch.

    Raises:
        InputError: not two rates, or a split of fewer than two images.

    Collectives: one broadcast of an object, and those of `trained_scores`.
    """
    share = config.low_shot_finetune_share
    is_lars = config.low_shot_finetune_optimizer == LARS_NAME
    of_sgd = [0.02, 5.0] if share <= 0.01 else [0.01, 0.2]
    rates = config.low_shot_finetune_rates or (PUBLISHED_LARS_RATES if is_lars else of_sgd)
    if len(rates) != 2 or not rates[0] > 0:
        raise InputError(
            f"evaluate.low_shot_finetune_rates={rates}: expected those of trunk (above 0) and classifier, or []"
        )
    subset, num_images = _split(trial, share, config.low_shot_finetune_split)
    recipe = Recipe(
        epochs=config.low_shot_finetune_epochs,
        batch=config.low_shot_finetune_batch,
        batch_key="evaluate.low_shot_finetune_batch",
        trunk_rate=rates[0],
        head_rate=rates[1],
        drops=() if is_lars else (12 / 20, 16 / 20),
        drop=0.2,
        optimizer=config.low_shot_finetune_optimizer,
        seed=config.low_shot_finetune_split,
        subset=str(subset),
        head_layers=config.low_shot_finetune_head_layers,
        head_layers_key="evaluate.low_shot_finetune_head_layers",
        crop_scale=(config.low_shot_finetune_crop_scale[0], config.low_shot_finetune_crop_scale[1]),
        flip=config.low_shot_finetune_flip,
        starts_linear=config.low_shot_finetune_linear_first,
    )
    return {**accuracies(trained_scores(trial, recipe)), "num_train": num_images}


def _split(trial: Trial, share: float, seed: int) -> tuple[Path, int]:
    """The file of a split, which the stream reads, and its number of images. Collectives: one broadcast."""
    known = labelled(trial.train)
    ids = known.ids[stratified(known.ids, known.labels, share, seed)]
    if len(ids) < 2:
        raise InputError(f"low-shot-finetune: {share:g} of {len(known)} training images; needs at least 2 of them")
    return keep_subset(trial.scratch, ids, "low-shot"), len(ids)
