"""Fine-tuning of the whole network with all labels, as VISSL does (Goyal et al., arXiv 2103.01988, appendix A).

SGD with Nesterov momentum 0.9, a rate of 0.1 per 256 images for trunk and classifier, no weight decay, 105 epochs, a
tenth of the rate after 30, 60, 90 and 100 of 105; BatchNorm in training mode over all ranks. Random resized crops and
flips; the last epoch is measured, on centre crops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from largescale.config import EvaluateConfig
from largescale.config.setting import setting
from largescale.evaluate.image_training import Trial, accuracies, trained_scores
from largescale.evaluate.training_recipe import Recipe
from largescale.evaluate.tuning_optimizer import LARS_NAME, SGD_NAME

CHOSEN_ON = "nothing; the rate is given and the last epoch is measured"

_DROPS = (30 / 105, 60 / 105, 90 / 105, 100 / 105)


@dataclass
class Settings(EvaluateConfig):
    """Keys under `evaluate`."""

    finetune_epochs: int = setting(105, "Epochs of fine-tuning.", at_least=1, at_most=10**6, free=True)
    finetune_batch: int = setting(
        256, "Images per step of fine-tuning, over all ranks.", at_least=1, at_most=2**31, free=True
    )
    finetune_rate: float = setting(0.1, "Learning rate of fine-tuning per 256 images.", above=0, at_most=1e9, free=True)
    finetune_weight_decay: float = setting(0.0, "Weight decay of fine-tuning.", at_least=0, at_most=1e6, free=True)
    finetune_optimizer: str = setting(
        SGD_NAME,
        "What trains the network: `sgd`, with steps of its rate, or `lars` with a cosine, as in "
        "arXiv 2006.10029; momentum 0.9.",
        one_of=(SGD_NAME, LARS_NAME),
        free=True,
    )
    finetune_head_layers: int = setting(
        0,
        "Layers of the projection head that stay between backbone and classifier, and are trained like the backbone "
        "(arXiv 2006.10029); 0 keeps none.",
        at_least=0,
        at_most=100,
        free=True,
    )


def measure(trial: Trial, config: Settings) -> dict[str, Any]:
    """Top-1 (and top-5) accuracy after the last epoch. Collectives: those of `trained_scores`."""
    recipe = Recipe(
        epochs=config.finetune_epochs,
        batch=config.finetune_batch,
        batch_key="evaluate.finetune_batch",
        trunk_rate=config.finetune_rate,
        head_rate=config.finetune_rate,
        weight_decay=config.finetune_weight_decay,
        drops=_DROPS if config.finetune_optimizer == SGD_NAME else (),
        nesterov=True,
        optimizer=config.finetune_optimizer,
        head_layers=config.finetune_head_layers,
        head_layers_key="evaluate.finetune_head_layers",
    )
    return accuracies(trained_scores(trial, recipe))
