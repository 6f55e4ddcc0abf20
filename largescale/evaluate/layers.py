"""Layer sweep: a linear probe on each stage of the frozen network, all of them trained in one pass over the images.

VISSL's protocol (Goyal et al., arXiv 1905.01235, and its eval_resnet_8gpu_transfer_in1k_linear): each stage's map is
averaged down to about 9,000 numbers, normalised by BatchNorm, and classified linearly; so are the network's features.
SGD with Nesterov momentum 0.9, a rate of 0.01 per 256 images, weight decay 5e-4 (none on BatchNorm), 28 epochs, a tenth
of the rate after 8, 16 and 24 of 28. Random resized crops and flips; the last epoch is measured, on centre crops.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from largescale.config import EvaluateConfig
from largescale.config.setting import setting
from largescale.evaluate.image_training import Probe, Trial, accuracies, scores_of
from largescale.evaluate.stage_maps import StageMaps
from largescale.evaluate.training_recipe import Recipe
from largescale.parallel.batchnorm import synchronize_batchnorm
from largescale.processes import world_size

CHOSEN_ON = "nothing; the rate is given and the last epoch is measured"

_DROPS = (8 / 28, 16 / 28, 24 / 28)
_FEATURES = "features"


@dataclass
class Settings(EvaluateConfig):
    """Keys under `evaluate`."""

    layers_numbers: int = setting(
        9216, "Numbers that a stage's map is averaged down to, at most.", at_least=1, at_most=10**7, free=True
    )
    layers_epochs: int = setting(28, "Epochs of the layer sweep.", at_least=1, at_most=10**6, free=True)
    layers_batch: int = setting(256, "Images per step of it, over all ranks.", at_least=1, at_most=2**31, free=True)
    layers_rate: float = setting(0.01, "Its learning rate per 256 images.", above=0, at_most=1e9, free=True)
    layers_weight_decay: float = setting(5e-4, "Its weight decay.", at_least=0, at_most=1e6, free=True)


def measure(trial: Trial, config: Settings) -> dict[str, Any]:
    """Top-1 and top-5 by stage; `top1` is that of the network's features. Collectives: those of `scores_of`."""
    recipe = Recipe(
        epochs=config.layers_epochs,
        batch=config.layers_batch,
        batch_key="evaluate.layers_batch",
        trunk_rate=0.0,
        head_rate=config.layers_rate,
        weight_decay=config.layers_weight_decay,
        drops=_DROPS,
        nesterov=True,
    )
    probes = Probes(trial, config.layers_numbers)
    scores = scores_of(probes, trial, recipe)
    by_stage = {}
    for number, (name, (channels, side)) in enumerate(probes.shapes.items()):
        own = None
        if scores is not None:
            own = replace(scores, features=scores.features.unflatten(1, (len(probes.shapes), -1))[:, number])
        by_stage[name] = {**accuracies(own), "numbers": channels * side**2}
    whole = by_stage[_FEATURES]
    by_measure = {
        f"{measure}_by_stage": {name: one[measure] for name, one in by_stage.items()}
        for measure in ("top1", "top5", "numbers")
    }
    return {"top1": whole["top1"], "top5": whole["top5"], **by_measure, "hits": whole["hits"]}


class Probes(Probe):
    """A frozen network with a classifier on each of its stages' maps, and on its features.

    Attributes:
        shapes: channels, and side of the pooled map, by name.
    """

    def __init__(self, trial: Trial, numbers: int) -> None:
        super().__init__()
        self.trunk = StageMaps(trial.method)
        size, num_classes = trial.config.evaluate.size, len(trial.train.manifest.classes)
        self.shapes = {
            f"stage {number}" if one.ndim == 4 else _FEATURES: (one.shape[1], _side(one, numbers))
            for number, one in enumerate(self._inside(torch.zeros(1, 3, size, size, device=trial.device)), 1)
        }
        generator = torch.Generator().manual_seed(0)
        heads = [_head(channels, side, num_classes, generator) for channels, side in self.shapes.values()]
        self.heads = nn.ModuleList(heads).to(trial.device)
        if world_size() > 1:
            self.heads = cast(nn.ModuleList, synchronize_batchnorm(self.heads, trial.device))

    def groups(self, recipe: Recipe) -> list[dict[str, Any]]:
        """The classifiers, and their BatchNorm without weight decay."""
        linear = [p for head in self.heads for p in head.get_submodule("linear").parameters()]
        scales = [p for head in self.heads for p in head.get_submodule("norm").parameters()]
        return [
            {"params": linear, "rate": recipe.head_rate},
            {"params": scales, "rate": recipe.head_rate, "weight_decay": 0.0},
        ]

    def trained(self) -> dict[str, Tensor]:
        """Those of the classifiers."""
        return self.heads.state_dict(prefix="heads.")

    def forward(self, images: Tensor) -> Tensor:
        """Scores [B, heads, classes] of normalised images [B, 3, S, S]."""
        pooled = [
            adaptive_avg_pool2d(one if one.ndim == 4 else one[:, :, None, None], side)
            for one, (_, side) in zip(self._inside(images), self.shapes.values(), strict=True)
        ]
        return torch.stack([head(one) for head, one in zip(self.heads, pooled, strict=True)], dim=1)

    def _inside(self, images: Tensor) -> list[Tensor]:
        """Maps [B, C, H, W] of the stages, then the features [B, D]."""
        maps, features = self.trunk(images)
        return [*maps, features]


def _side(one: Tensor, numbers: int) -> int:
    """Of the pooled map: the largest with at most so many numbers."""
    most = int((numbers / one.shape[1]) ** 0.5) if one.ndim == 4 else 1
    return max(1, min(most, *(one.shape[2:] or (1, 1))))


def _head(channels: int, side: int, num_classes: int, generator: torch.Generator) -> nn.Module:
    head = nn.Sequential()
    head.add_module("norm", nn.BatchNorm2d(channels))
    head.add_module("flat", nn.Flatten())
    linear = nn.Linear(channels * side**2, num_classes)
    with torch.no_grad():
        linear.weight.copy_(0.01 * torch.randn(linear.weight.shape, generator=generator))
        linear.bias.zero_()
    head.add_module("linear", linear)
    return head
