"""SimSiam: a prediction from one view meets the embedding of another, made by the same network (arXiv 2011.10566).

Loss for predictions p and embeddings z of two views, through which no gradient goes, the naive loop::

    for i in images:
        loss -= cos(p[0][i], z[1][i]) / 2
        loss -= cos(p[1][i], z[0][i]) / 2
    loss /= N

It goes from 1 to -1. With small crops, it is minus the mean cosine over all pairs of a large view's z and another's p.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from largescale.config import Config
from largescale.config.setting import setting
from largescale.methods.embedding_method import Named
from largescale.methods.losses.cosine import cosine
from largescale.methods.method import Output
from largescale.methods.predicting import Predicting, PredictingSettings
from largescale.models.heads import hidden_widths, mlp
from largescale.optim.roles import Role


@dataclass
class Settings(PredictingSettings):
    """SimSiam's keys under `method`."""

    hidden: list[int] = hidden_widths([2048, 2048])
    embedding: int = setting(2048, "Dimension of the embeddings.", at_least=1, at_most=2**24)
    predictor_hidden: list[int] = hidden_widths([512], "the predictor")
    stop_gradient: bool = setting(
        True, "Whether embeddings that are predicted take no gradient; if they do, all collapse."
    )


class SimSiam(Predicting):
    """Backbone, projection and predictor, and the loss of a batch. Nothing goes on from step to step."""

    title = "SimSiam"
    reference = "simsiam/resnet50_100ep"
    Settings = Settings

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.method, Settings)
        settings = self.config = config.method
        width = settings.embedding
        self.projection = mlp(
            [self.num_features, *settings.hidden, width], bias=False, last_bias=False, last_norm="plain"
        )
        self.predictor = mlp([width, *settings.predictor_hidden, width], bias=False, last_bias=True)

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The loss of a batch; predictions and what they predict are of the same pass. Collectives: none."""
        predictions, embeddings = inputs["predictions"], inputs["embeddings"]
        targets = embeddings.detach() if self.config.stop_gradient else embeddings
        return self.output(cosine(predictions, targets) - 1, predictions, targets, embeddings)

    def roles(self) -> list[Role]:
        """The predictor's rate stays at its peak: it is to keep up with embeddings that change (section 4.2)."""
        return [Role("predictor", "predictor.*", scheduled=False)]

    @classmethod
    def missing(cls, config: Config) -> str:
        """What keeps the method from collapse and is switched off."""
        assert isinstance(config.method, Settings)
        if not config.method.stop_gradient:
            return "Targets take a gradient: set method.stop_gradient=true, in another run.dir"
        return ""

    @classmethod
    def loss_references(cls, config: Config) -> dict[str, float]:
        """The loss of views that predict each other exactly."""
        return {"views alike": -1.0}
