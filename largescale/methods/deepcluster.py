"""DeepCluster: clusters of a network's own features are the classes that it learns, found again every epoch
(arXiv 1807.05520).

s[i] is the cluster of image i, n[k] the size of cluster k, K' the number of those with images. The naive loop::

    before an epoch:
        x = features of all images, seen plainly; of hidden layers, if there are any, before the last ReLU
        y = whitened principal components of x, as unit vectors
        s = kmeans(y, K)
        W, b = N(0, 0.01), 0
    in each step:
        for i in images:
            for x in the features of views of i:
                loss += -log softmax(W x + b)[s[i]] N / (K' n[s[i]]) / B / V
        W, b = W, b - head_lr (their gradient + head_weight_decay W, b)

The published code draws images such that clusters come equally often, with replacement; the same expectation has a loss
with weights 1 / n, in which every image comes once per epoch. Published heads are trained by an SGD of their own,
without momentum and at a constant rate, and drawn again with every clustering. So here the head is state of the method,
not a parameter: no optimizer holds anything of it that would have to be forgotten.

Departures from the published code, besides: clusters that lose their images take half of another's, where labels are
numbered again there; images that cannot be read have no cluster, and count as zero; clusters and head are part of a
checkpoint, where there a run that stops clusters again. Components come from sums in float64 of each rank: clusters
found on another number of ranks may differ for images that are as near to one as to another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from largescale.clustering.kmeans import kmeans
from largescale.config import Config
from largescale.distributed.collectives import gather_rows
from largescale.methods import clusters_found
from largescale.methods.embedding_method import Named
from largescale.methods.feature_clusters import (
    FeatureClusters,
    FeatureClustersSettings,
    faster_head,
    features_bytes,
    head_width,
    settings_of,
    weights_of,
)
from largescale.methods.method import Output, Panel, Sign, Symptom
from largescale.methods.own_head import OwnHead
from largescale.methods.phase import PlainEmbeddings
from largescale.methods.replicated import replicated
from largescale.methods.state_size import bytes_per_number
from largescale.processes import rank


@dataclass
class Settings(FeatureClustersSettings):
    """DeepCluster's keys under `method`."""


class DeepCluster(FeatureClusters):
    """Backbone, clusters by sample id, a head that is drawn again with them, and the loss over the views of a batch.
    Evidence: none.
    """

    title = "DeepCluster"
    reference = "deepcluster/resnet50_200ep"
    Settings = Settings

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.head = OwnHead(
            self.width, self.micro_batches, lr=self.shared.head_lr, weight_decay=self.shared.head_weight_decay
        )
        self.signs = {"cluster_picked": Sign(), "same_cluster": Sign()}

    @classmethod
    def phase_bytes(cls, config: Config, images: int) -> int:
        """Most bytes that a rank holds in a phase beside networks: features, components, clusters, what finds them."""
        clusters = settings_of(config).clusters
        of_head = 3 * clusters * (head_width(config) + 1) * bytes_per_number(config)
        return of_head + features_bytes(config, images, clusters)

    def begin(self) -> None:
        """Make room for clusters and head."""
        super().begin()
        self.head.make_room(self.shared.clusters)

    @torch.no_grad()
    def phase(self, step: int, corpus: PlainEmbeddings, beat: Callable[[str], None]) -> dict[str, float]:
        """Cluster the corpus, and draw another head.

        Collectives: those of `whitened`, `kmeans`, `beat`'s among them, and `agreement`.
        """
        before, count, iterations = self.assignments.own.clone(), self.shared.clusters, self.shared.kmeans_iterations
        with clusters_found.blaming(count, step):
            points = self.points(corpus)
            clusters = kmeans(points, count, seed=self.kmeans_seed(step), iterations=iterations, beat=beat)
        self.assignments.own.fill_(-1)
        self.assignments.own[corpus.readable, 0] = clusters.assignments.to(torch.int32)
        self.weights.copy_(weights_of(clusters.sizes))
        self.head.draw(self.seed, step)
        return clusters_found.found(before, self.assignments.own, [clusters.sizes], beat)

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The loss of a batch, or of one of its micro-batches.

        Collectives: an all-gather of ids, an all-reduce of their clusters; in the last micro-batch one of the head's
        gradient.
        """
        assigned = self.assignments.read(gather_rows(ids))
        own = assigned[rank() * len(ids) :][: len(ids)].long()
        x = inputs["features"].flatten(0, 1)
        loss, picked = self.head.losses(x, own[:, 0].repeat(len(x) // len(ids)), self.weights)
        signs = {
            "cluster_picked": picked,
            "same_cluster": clusters_found.same_cluster(assigned, [self.shared.clusters]),
        }
        return Output(loss, signs, {})

    def after_update(self, step: int) -> None:
        """Update the head."""
        self.head.update()

    def state(self, mesh: DeviceMesh) -> dict[str, Tensor]:
        """Clusters of images, sharded by id, and head and weights, which all ranks hold."""
        same = {"head": self.head.rows, "weights": self.weights}
        return {
            "assignments": self.assignments.tensor(mesh),
            **{name: replicated(value, mesh) for name, value in same.items()},
        }

    def measures(self, loss: float, signs: dict[str, Tensor], num_images: int) -> dict[str, float]:
        """Signs, and the loss over ln K."""
        over = {"loss_over_ln_k": loss / clusters_found.uniform_loss([self.shared.clusters])}
        return over | super().measures(loss, signs, num_images)

    @classmethod
    def loss_references(cls, config: Config) -> dict[str, float]:
        """The loss of uniform predictions."""
        return {"ln K (uniform predictions)": clusters_found.uniform_loss([settings_of(config).clusters])}

    @classmethod
    def symptoms(cls, config: Config) -> list[Symptom]:
        """That one cluster holds most images, or that clusters are not learnt."""
        remedy = f"Try, in another run.dir, optim.lr={config.optim.lr / 2:.2g} or a longer optim.warmup_epochs"
        settings = settings_of(config)
        return [
            clusters_found.one_for_most(remedy, [settings.clusters]),
            clusters_found.not_learnt(config, remedy=faster_head(settings)),
        ]

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """Clusters in steps and in phases."""
        return clusters_found.panels()
