"""BYOL: a prediction from one view meets what a slowly following network sees in another (arXiv 2006.07733).

Loss for predictions p of the student and embeddings k of the teacher, two views, the naive loop::

    for i in images:
        loss += 2 - 2 * cos(p[0][i], k[1][i])
        loss += 2 - 2 * cos(p[1][i], k[0][i])
    loss /= N

It goes from 0 to 8. With small crops, which the teacher does not see, it is twice the mean over all pairs of a large
view and another one.

Both networks are in training mode, each with the statistics of its own batch, one view at a time. The published teacher
starts from weights of its own, this one as a copy; the paper found no difference.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from largescale.config import Config
from largescale.config.setting import setting
from largescale.methods.bootstrapped import Bootstrapped, TeacherSettings
from largescale.methods.embedding_method import Named
from largescale.methods.method import Output
from largescale.models.heads import hidden_widths, mlp


@dataclass
class Settings(TeacherSettings):
    """BYOL's keys under `method`."""

    hidden: list[int] = hidden_widths([4096])
    predictor: bool = setting(True, "Whether there is a predictor; without one, embeddings collapse.")
    predictor_hidden: list[int] = hidden_widths([4096], "the predictor", used_if="method.predictor")


class BYOL(Bootstrapped):
    """Student with predictor, teacher, and the loss of a batch."""

    title = "BYOL"
    reference = "byol/resnet50_300ep"
    Settings = Settings

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        settings = config.method
        assert isinstance(settings, Settings)
        width = settings.embedding
        self.projection = mlp([self.num_features, *settings.hidden, width], bias=True, last_bias=False)
        self.predictor: nn.Module = nn.Identity()
        if settings.predictor:
            self.predictor = mlp([width, *settings.predictor_hidden, width], bias=True, last_bias=False)
        self.make_teacher()

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The loss of a batch. Collectives: none."""
        return self.bootstrap_loss(inputs["predictions"], inputs)

    @classmethod
    def missing(cls, config: Config) -> str:
        """What keeps the method from collapse and is switched off."""
        assert isinstance(config.method, Settings)
        if not config.method.predictor:
            return "There is no predictor: set method.predictor=true, in another run.dir"
        return ""
