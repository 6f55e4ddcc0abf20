"""DeepCluster-v2: every view picks the cluster that its image had at the start of the epoch (arXiv 2006.09882 and its
published code).

Of an image i, m[i][0] and m[i][1] are the embeddings of its first two views when it was last met: a bank. Before each
epoch spherical k-means on one of them finds K[h] clusters for each head h, whose centroids c[h] take the place of a
last layer; they are never trained. s[h][i] is the image's cluster. The naive loop::

    before each epoch:
        for h in range(H):
            c[h], s[h] = spherical_kmeans(m[:, h % 2], K[h])
    in each step:
        for h in range(H):
            for i in images:
                for z in the views of i:
                    loss += -log softmax(z @ c[h] / temperature)[s[h][i]] / H / B / V
        for i in images:
            m[i] = embeddings of its views 0 and 1

The bank is one epoch old where the network has moved on, and costs no pass over the images, but before the first step:
there each image is embedded once, plainly, and the mean of all embeddings is subtracted before they are unit vectors
again. As BatchNorm's running statistics mean nothing yet, all embeddings share one direction; without it they, and so
the centroids, would nearly be one vector. The published code fills the bank with a pass of the training views instead,
whose embeddings by BatchNorm over a batch depend on how many ranks there are.

Departures from the published code. An image that an epoch leaves out keeps its row, and so gets a cluster among the new
ones. Centroids start from rows of all ranks, not of rank 0's alone; one that loses its images takes half of another's,
where there it stays empty. Bank, clusters and centroids are part of a checkpoint and load into any number of ranks,
where there each rank has a file of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import cross_entropy

from largescale.clustering.kmeans import Clusters, kmeans, working_bytes
from largescale.config import Config
from largescale.config.schema import MethodConfig
from largescale.config.setting import setting
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.distributed.collectives import gather_rows
from largescale.methods import clusters_found
from largescale.methods.choice import Choice
from largescale.methods.embedding_method import Named
from largescale.methods.joint_embedding import JointEmbedding, unit
from largescale.methods.method import Exemplars, Output, Panel, Sign, Symptom
from largescale.methods.multi_crop import by_size, require_two_large
from largescale.methods.phase import PlainEmbeddings, centred
from largescale.methods.replicated import replicated
from largescale.methods.rows_by_id import RowsById
from largescale.methods.state_size import bytes_per_number
from largescale.models.backbones import build_backbone
from largescale.models.evaluation_mode import running_statistics_used
from largescale.models.heads import hidden_widths, projection_head
from largescale.processes import rank, world_size

_PURPOSE = 43
"""Keeps the numbers that seed k-means apart from others of the same seed and step."""
_BANKS = 2


@dataclass
class Settings(MethodConfig):
    """DeepCluster-v2's keys under `method`."""

    hidden: list[int] = hidden_widths()
    head_batchnorm: bool = setting(True, "BatchNorm after each hidden layer of the projection head.")
    embedding: int = setting(128, "Dimension in which views are compared with centroids.", at_least=1, at_most=2**24)
    clusters: list[int] = setting(
        [3000, 3000, 3000],
        "Numbers of clusters, a head with a k-means of its own for each; 50 to 300 for tens of thousands of images.",
        at_least=2,
        at_most=2**31,
        min_length=1,
        expected="numbers of at least 2",
    )
    temperature: float = setting(0.1, "Divides cosines before the softmax.", at_least=1e-6, at_most=1e6)
    kmeans_iterations: int = setting(10, "Iterations of a k-means, at most.", at_least=1, at_most=10**6)
    max_phase_gb: float = clusters_found.max_phase_setting()

    def check(self, config: Config) -> None:
        """Two large views, which the bank is of."""
        require_two_large(config)


class DeepClusterV2(JointEmbedding):
    """Backbone, projection head, bank, clusters, and the loss over the views of a batch.

    Evidence: `embeddings` [V, B, D].
    """

    title = "DeepCluster-v2"
    reference = "deepclusterv2/resnet50_800ep"
    head_name = "projection"
    Settings = Settings
    later_phases = True
    exemplars: ClassVar[Exemplars] = Exemplars("cluster", "What clusters stand for")
    exemplar_state = ("centroids",)
    centroids: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        settings = self.config = _settings(config)
        self._seed, self._counts = config.run.seed, settings.clusters
        self.backbone, self.num_features = build_backbone(config.model)
        self.projection = projection_head(
            self.num_features, settings.hidden, settings.embedding, batchnorm=settings.head_batchnorm
        )
        # Of both banks side by side: [N, 2 D]. A row of zeros is of an image that was never met.
        self.bank = RowsById(_BANKS * settings.embedding)
        self.assignments = RowsById(len(self._counts), torch.int32)
        # Of all heads, one after the other: [sum of K, D].
        self.register_buffer("centroids", torch.zeros(0, settings.embedding), persistent=False)
        self.signs = {**self.embedding_signs(settings.embedding), "cluster_picked": Sign(), "same_cluster": Sign()}

    @classmethod
    def misfit(cls, config: Config, length: Length) -> str:
        """There may be fewer images than clusters, or too many for the bank."""
        settings, images = _settings(config), length.num_samples
        size = cls.phase_bytes(config, images)
        return clusters_found.misfit_of(settings.clusters, images, size, settings.max_phase_gb)

    @classmethod
    def phase_bytes(cls, config: Config, images: int) -> int:
        """Most bytes that a rank holds in a phase beside networks: bank, clusters, and what finds them."""
        settings, own, number = _settings(config), -(-images // world_size()), bytes_per_number(config)
        width, counts = settings.embedding, settings.clusters
        of_image = (_BANKS + 2) * width * number + 2 * len(counts) * torch.int32.itemsize
        return own * of_image + sum(counts) * width * number + working_bytes(own, max(counts), width, number)

    def begin(self) -> None:
        """Make room for bank, clusters and centroids."""
        for rows in (self.bank, self.assignments):
            rows.make_room(self.length.num_samples, key="method.max_phase_gb", max_gb=math.inf)
        self.assignments.own.fill_(-1)
        self.centroids = self.centroids.new_zeros(sum(self._counts), self.config.embedding)

    def phase_due(self, step: int) -> bool:
        """Before each epoch."""
        return step % self.length.steps_per_epoch == 0

    def phase_embeds(self, step: int) -> bool:
        """Before the first step alone: the bank is empty."""
        return step == 0

    def plain(self, images: Tensor) -> Tensor:
        """Embeddings: unit vectors [B, D], by BatchNorm's running statistics."""
        with running_statistics_used(self.modules()):
            return self.project(self.backbone(images))

    def project(self, features: Tensor) -> Tensor:
        """Backbone features [N, F] to unit embeddings [N, D] in float32 (float64 for a float64 model)."""
        return unit(self.projection(features))

    @torch.no_grad()
    def phase(self, step: int, corpus: PlainEmbeddings, beat: Callable[[str], None]) -> dict[str, float]:
        """Cluster the bank, filled before if it is empty.

        Collectives: those of `kmeans`, `beat`'s among them, and of `agreement`, once per head; those of `mean_of_rows`.
        """
        if self.phase_embeds(step):
            for theirs, rows in centred(corpus):
                self.bank.own[theirs] = rows.to(self.bank.rows.dtype).repeat(1, _BANKS)
        before, met = self.assignments.own.clone(), self.bank.own.any(1)
        sizes = []
        for head, centroids in enumerate(self.centroids.split(self._counts)):
            clusters = self._clusters(step, head, met, beat)
            centroids.copy_(clusters.centroids)
            self.assignments.own[met, head] = clusters.assignments.to(torch.int32)
            sizes.append(clusters.sizes)
            del clusters  # before the next are made
        return clusters_found.found(before, self.assignments.own, sizes, beat)

    def _clusters(self, step: int, head: int, met: Tensor, beat: Callable[[str], None]) -> Clusters:
        """Of the images that were met, for one head. Collectives: those of `kmeans`."""
        with clusters_found.blaming(self._counts, step):
            return kmeans(
                self.bank.own.chunk(_BANKS, dim=1)[head % _BANKS][met],
                self._counts[head],
                seed=clusters_found.kmeans_seed(self._seed, step, head, _PURPOSE),
                iterations=self.config.kmeans_iterations,
                spherical=True,
                beat=beat,
            )

    def embed(self, views: Views) -> Named:
        """`embeddings` of all views, unit vectors [V, B, D]; the head sees them all at once."""
        features = torch.cat([self.backbone(images) for images in by_size(views.images)])
        return {"embeddings": self.project(features).unflatten(0, (-1, len(views.ids)))}

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The loss of a batch, or of one of its micro-batches; images that were never met count as zero.

        Collectives: an all-gather of ids and one of the embeddings of two views, an all-reduce of their clusters.
        """
        z = inputs["embeddings"]
        all_ids = gather_rows(ids)
        assigned = self.assignments.read(all_ids)
        own = assigned[rank() * len(ids) :][: len(ids)].long()
        with torch.autocast(z.device.type, enabled=False):
            found = [self._picking(z, centroids, own[:, head]) for head, centroids in enumerate(self._heads(z))]
        losses, picked = (torch.stack(values) for values in zip(*found, strict=True))
        self._keep(z[:_BANKS].detach(), all_ids)
        signs = self.watch_embeddings(z[0], z[1])
        signs |= {"cluster_picked": picked.mean(), "same_cluster": clusters_found.same_cluster(assigned, self._counts)}
        return Output(losses.mean(), signs, {"embeddings": z.detach()})

    def _heads(self, z: Tensor) -> tuple[Tensor, ...]:
        return self.centroids.to(z.dtype).split(self._counts)

    def _picking(self, z: Tensor, centroids: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of one head, and the share of views [V, B, D] that pick the cluster of their image [B]."""
        logits = (z @ centroids.T / self.config.temperature).flatten(0, 1)
        wanted = own.repeat(len(z))
        losses = cross_entropy(logits, wanted, ignore_index=-1, reduction="none")
        return losses.mean(), (logits.detach().argmax(1) == wanted).to(z.dtype).mean()

    @torch.no_grad()
    def _keep(self, z: Tensor, all_ids: Tensor) -> None:
        """Put the first two views [2, B, D] into the bank, for the next epoch."""
        self.bank.write(all_ids, gather_rows(z.transpose(0, 1).flatten(1)))

    def state(self, mesh: DeviceMesh) -> dict[str, Tensor]:
        """Bank and clusters, sharded by id, and centroids, which all ranks hold."""
        return {
            "bank": self.bank.tensor(mesh),
            "assignments": self.assignments.tensor(mesh),
            "centroids": replicated(self.centroids, mesh),
        }

    def exemplar_scores(self, features: Tensor) -> list[Tensor]:
        """Cosines with the centroids of each head."""
        z = self.project(features)
        return [z @ centroids.T for centroids in self._heads(z)]

    @classmethod
    def suited(cls, config: Config, length: Length) -> dict[str, Choice]:
        """At most one cluster for every ten images."""
        return clusters_found.suited(_settings(config).clusters, length)

    @classmethod
    def loss_references(cls, config: Config) -> dict[str, float]:
        """The loss of uniform predictions."""
        return {"ln K (uniform predictions)": clusters_found.uniform_loss(_settings(config).clusters)}

    @classmethod
    def symptoms(cls, config: Config) -> list[Symptom]:
        """That one cluster holds most images, beside the symptoms of embeddings, which bring it about."""
        return [*super().symptoms(config), clusters_found.one_for_most(cls.remedy(config), _settings(config).clusters)]

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """Clusters, before the panels of embeddings."""
        return [*clusters_found.panels(), *super().panels(config)]


def _settings(config: Config) -> Settings:
    assert isinstance(config.method, Settings)
    return config.method
