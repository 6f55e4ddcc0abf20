"""RotNet: by how many quarters was a view turned? To say so, a network has to know what is in it (arXiv 1803.07728).

The naive loop::

    for i in images:
        for view in views of i:
            for turn in (0, 1, 2, 3):                           # or for one of them, at random
                loss += -log softmax(head(backbone(rot90(view, turn))))[turn] / B / V / 4

Views are turned behind all augmentation, by flips and transposes alone, so that neither a border nor resampling by the
turn says what is up. A crop that is not square has been squeezed before: see `data.crops.N.ratio`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from largescale.config import Config
from largescale.config.group_augment import augment_of_group
from largescale.config.schema import MethodConfig
from largescale.config.setting import setting
from largescale.data.length import Length
from largescale.data.task_views.rotation import NUM_TURNS, all_turns, random_turns, turned
from largescale.data.views import Views
from largescale.methods.embedding_method import Named
from largescale.methods.method import Symptom
from largescale.methods.pictures import Pictures, in_range
from largescale.methods.pretext_task import PretextTask
from largescale.models.backbones import build_backbone
from largescale.models.heads import hidden_widths, projection_head

_HALF_A_QUARTER = 45
_TOO_EASY = 0.998


def turns_setting(default: str) -> Any:
    """How many turns of each view a step sees: a field of a dataclass."""
    return setting(
        default,
        "Turns of each view that a step sees: `all` four of them, which costs four views, or `one` at random.",
        one_of=("all", "one"),
    )


def turned_views(views: Views, turns: str, *, seed: int, step: int) -> Views:
    """Views turned as `turns_setting` says; the fact `turns`, int64 [V, B], is by how many quarters."""
    batch = len(views.ids)
    found = [
        all_turns(images, batch)
        if turns == "all"
        else random_turns(images, views.ids, seed=seed, step=step, group=group)
        for group, images in enumerate(views.images)
    ]
    return views._replace(
        images=[one.images for one in found], facts={**views.facts, "turns": torch.cat([one.turns for one in found])}
    )


def turns_unclear(config: Config) -> list[str]:
    """A line if augmentation rotates views so far that their turn does not show."""
    places = range(len(config.data.crops))
    most = max(augment_of_group(config.data, place).rotate_degrees for place in places)
    if most < _HALF_A_QUARTER:
        return []
    return [
        f"data.augment.rotate_degrees={most:g}: views that are rotated so far do not show by how many quarters they "
        f"were turned; set data.augment.rotate_degrees to less than {_HALF_A_QUARTER}"
    ]


@dataclass
class Settings(MethodConfig):
    """Rotation's keys under `method`."""

    hidden: list[int] = hidden_widths((), of="what stands between backbone and answer, without BatchNorm")
    turns: str = turns_setting("all")


class Rotation(PretextTask):
    """Backbone, a linear head, and the loss over turned views. Evidence: `logits` [V, B, 4]."""

    title = "Rotation"
    reference = "rotation/resnet50_105ep"
    Settings = Settings
    square_crops = True  # squeezed views tell a quarter from a half turn, unless images are square
    pictures = Pictures(
        "Turned back",
        "Images turned by quarters, and turned back by as many as the network tells.",
        ("turned", "turned back", "image"),
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._settings, self._seed, self._run = _settings(config), config.run.seed, config
        self.backbone, self.num_features = build_backbone(config.model)
        self.head = projection_head(self.num_features, self._settings.hidden, NUM_TURNS, batchnorm=False)

    @classmethod
    def num_classes(cls, config: Config) -> int:
        """Turns."""
        return NUM_TURNS

    def task_views(self, views: Views, step: int) -> Views:
        """Views turned, and by how many quarters."""
        return turned_views(views, self._settings.turns, seed=self._seed, step=step)

    def draw(self, views: Views) -> list[Tensor]:
        """Images in a random turn, turned back as told, and as they were."""
        [images] = views.images
        shown = random_turns(images, views.ids, seed=self._seed, step=0).images
        told = self.head(self.backbone(shown)).argmax(1)
        return [in_range(one, self._run) for one in (shown, turned(shown, -told % NUM_TURNS), images)]

    def embed(self, views: Views) -> Named:
        """`logits` of all views, [V, B, 4]."""
        features = torch.cat([self.backbone(group) for group in views.images])
        return {"logits": self.head(features).unflatten(0, (-1, len(views.ids)))}

    def targets(self, views: Views) -> Named:
        """`wanted`: the turns of all views, int64 [V, B]."""
        return {"wanted": views.facts["turns"]}

    @classmethod
    def complaints(cls, config: Config, length: Length) -> list[str]:
        """Also whether turns can be seen."""
        return [*turns_unclear(config), *super().complaints(config, length)]

    @classmethod
    def symptoms(cls, config: Config) -> list[Symptom]:
        """Also that something may give turns away."""
        too_easy = Symptom(
            "task too easy",
            sign=lambda row: row.get("task_accuracy"),
            sick=(_TOO_EASY, 1),
            recovery="down",
            seen=lambda row: f"{row['task_accuracy']:.1%} of the turns are found",
            meaning="there is nothing left to learn, and something else than what images show may give them away",
            remedy="Look for borders, captions or marks that all images have, or train for fewer epochs",
            in_settings=True,
        )
        return [*super().symptoms(config), too_easy]


def _settings(config: Config) -> Settings:
    assert isinstance(config.method, Settings)
    return config.method
