"""Shared by methods in which a student predicts what a slowly following teacher sees of other views."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from largescale.config import Config
from largescale.config.setting import setting
from largescale.data.views import Views
from largescale.methods.embedding_method import Named
from largescale.methods.losses.cosine import cosine
from largescale.methods.method import Average, Output
from largescale.methods.multi_crop import each_view
from largescale.methods.predicting import Predicting, PredictingSettings
from largescale.methods.teachers import cosine_momentum, following, teacher_of


@dataclass
class TeacherSettings(PredictingSettings):
    """Keys under `method` of a student that predicts what a teacher sees."""

    momentum: float = setting(
        0.99,
        "Fraction of its weights that the teacher keeps in the first step; rises to 1 by a cosine. "
        "Published: 0.996 for 1000 epochs, 0.99 for 100 and 300, 0.97 for 40.",
        at_least=0,
        at_most=1,
    )


class Bootstrapped(Predicting):
    """A student that predicts what a teacher sees of other views; a subclass makes the heads."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.method, TeacherSettings)
        self._first_momentum = config.method.momentum

    def targets(self, views: Views) -> Named:
        """`targets` [A, B, D]: the teacher's embeddings of the large views."""
        large = each_view(views)[: self.num_large]
        backbone, projection = self.teacher["backbone"], self.teacher["projection"]
        return {"targets": torch.stack([projection(backbone(view)) for view in large])}

    def make_teacher(self) -> None:
        """Make the teacher, a copy of backbone and projection."""
        self.teacher = teacher_of(backbone=self.backbone, projection=self.projection)

    def averages(self) -> list[Average]:
        """The teacher follows in weights; it has running statistics of its own."""
        return following("teacher", "backbone", "projection")

    def average_momentum(self, step: int) -> float:
        """From the setting to 1, by a cosine."""
        return cosine_momentum(self._first_momentum, step, self.length.num_steps)

    def bootstrap_loss(self, predictions: Tensor, inputs: Named) -> Output:
        """BYOL's loss: 0 to 8 for two views. Collectives: none."""
        loss = 4 * cosine(predictions, inputs["targets"])
        return self.output(loss, predictions, inputs["targets"], inputs["embeddings"])
