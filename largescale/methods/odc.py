"""ODC: clusters and network change together, a little in every step (arXiv 2006.10645).

Of an image i, m[i] is a running average of its embeddings, s[i] its cluster: a memory of samples. Of a cluster k, c[k]
is the mean of its images' rows at length 1: a memory of centroids. Before the first step k-means over all images fills
both. The naive loop::

    in step t:
        if t % centroids_every == 0:
            c[k] = mean(m[i] for i in k), at length 1                   # for all k
            for k in clusters with fewer than least_images:
                s[i] = the nearest of the other clusters                # for all i in k
            for k in these clusters, now empty:
                k and the largest cluster = its two halves by k-means
        w[k] = size[k] ** -size_power, 1 on average over images
        for i in images:
            for z in the embeddings of views of i:
                loss += -log softmax(W z + b)[s[i]] w[s[i]] / B / V
        for i in images:
            m[i] = momentum m[i] + (1 - momentum) mean of its views' z at length 1, at length 1
            s[i] = the nearest of c to m[i]
        W, b = W, b - head_lr (their gradient + head_weight_decay W, b)

Clusters hardly change in a step, so the head goes on; nothing is drawn again, and no image is read but for training.
Sums of rows by cluster are kept in fixed point, of which a step adds and subtracts what it changes: exact in any order,
so means cost no pass over the memory, and all ranks hold the same ones.

Departures from the published code: dropout in the head is left out, and embeddings are compared before the ReLU that
the published head ends with; centroids have length 1; small clusters are looked for when centroids are computed, not in
every step; of the first memory the mean of all rows is subtracted (see `phase.centred`); memories are part of a
checkpoint, where published ones are lost with a run that stops. Images that cannot be read in the phase have no cluster
until they are met, and count as zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.distributed.device_mesh import DeviceMesh

from largescale.clustering.kmeans import kmeans, nearest_centroids, working_bytes
from largescale.config import Config
from largescale.config.schema import MethodConfig
from largescale.config.setting import setting
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.distributed.collectives import gather_rows
from largescale.methods import clusters_found
from largescale.methods.choice import Choice
from largescale.methods.embedding_method import EmbeddingMethod, Named
from largescale.methods.joint_embedding import unit
from largescale.methods.method import Exemplars, Output, Panel, Row, Sign, Symptom
from largescale.methods.own_head import OwnHead
from largescale.methods.phase import PlainEmbeddings, centred
from largescale.methods.replicated import replicated
from largescale.methods.rows_by_id import RowsById, last_of_each
from largescale.methods.state_size import bytes_per_number
from largescale.methods.sums_by_cluster import SumsByCluster
from largescale.models.backbones import build_backbone
from largescale.models.evaluation_mode import running_statistics_used
from largescale.models.heads import hidden_widths, projection_head
from largescale.processes import rank, world_size

_PURPOSE = 46
"""Keeps the numbers that seed k-means apart from others of the same seed and step."""
_OF_THE_MEAN = 5
"""A cluster is suggested to be small where it has less than this part of the mean size."""


@dataclass
class Settings(MethodConfig):
    """ODC's keys under `method`."""

    hidden: list[int] = hidden_widths((512,))
    head_batchnorm: bool = setting(True, "BatchNorm after each hidden layer of the projection head.")
    embedding: int = setting(256, "Dimension of what is clustered.", at_least=1, at_most=2**24)
    clusters: int = setting(
        10000, "Number of clusters; 50 to 300 for tens of thousands of images.", at_least=2, at_most=2**31
    )
    momentum: float = setting(0.5, "Part that a row of the memory keeps when its image is met.", at_least=0, below=1)
    centroids_every: int = setting(
        10,
        "Steps from one computation of centroids, and search for small clusters, to the next.",
        at_least=1,
        at_most=10**9,
    )
    least_images: int = setting(
        20, "A cluster of fewer images is dissolved, and takes half of the largest one.", at_least=2, at_most=2**31
    )
    size_power: float = setting(
        0.5,
        "Images weigh as their cluster's size to minus this; 0: all alike, 1: all clusters alike.",
        at_least=0,
        at_most=1,
    )
    kmeans_iterations: int = setting(20, "Iterations of a k-means, at most.", at_least=1, at_most=10**6)
    head_lr: float = setting(0.06, "Constant learning rate of the head, without momentum.", above=0, at_most=1e6)
    head_weight_decay: float = setting(1e-5, "Weight decay of the head.", at_least=0, at_most=1e6)
    max_phase_gb: float = clusters_found.max_phase_setting()


class ODC(EmbeddingMethod):
    """Backbone, projection head, the memories of samples and centroids, a head of its own, and the loss over the views
    of a batch. Evidence: none.
    """

    title = "ODC"
    reference = "odc/resnet50_440ep"
    head_name = "projection"
    Settings = Settings
    rates = ("head_lr",)
    exemplars: ClassVar[Exemplars] = Exemplars("cluster", "What clusters stand for")
    exemplar_state = ("centroids",)
    centroids: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        settings = self.config = _settings(config)
        self._seed, width = config.run.seed, settings.embedding
        self.backbone, self.num_features = build_backbone(config.model)
        self.projection = projection_head(self.num_features, settings.hidden, width, batchnorm=settings.head_batchnorm)
        # A row of zeros is of an image that was never met.
        self.memory, self.assignments = RowsById(width), RowsById(1, torch.int32)
        self.sums = SumsByCluster(width)
        self.head = OwnHead(
            width, config.train.accumulate, lr=settings.head_lr, weight_decay=settings.head_weight_decay
        )
        self.register_buffer("centroids", torch.zeros(0, width), persistent=False)
        self.signs = {name: Sign() for name in ("cluster_picked", "same_cluster", "moved", "small_clusters")}

    @classmethod
    def misfit(cls, config: Config, length: Length) -> str:
        """There may be fewer images than clusters need, or too many for the memory."""
        settings, images = _settings(config), length.num_samples
        size = cls.phase_bytes(config, images)
        if line := clusters_found.misfit_of(settings.clusters, images, size, settings.max_phase_gb):
            return line
        if settings.least_images * settings.clusters <= images:
            return ""
        return (
            f"method.least_images={settings.least_images}: {settings.clusters:,} clusters have "
            f"{images / settings.clusters:.1f} images on average; lower it, or method.clusters"
        )

    @classmethod
    def phase_bytes(cls, config: Config, images: int) -> int:
        """Most bytes that a rank holds in the phase beside networks: memories, and what finds clusters."""
        settings, own, number = _settings(config), -(-images // world_size()), bytes_per_number(config)
        count, width = settings.clusters, settings.embedding
        of_image = 3 * width * number + 2 * torch.int32.itemsize
        of_cluster = 4 * width * number + 2 * width * torch.int64.itemsize
        return own * of_image + count * of_cluster + working_bytes(own, count, width, number)

    def begin(self) -> None:
        """Make room for memories and head."""
        for rows in (self.memory, self.assignments):
            rows.make_room(self.length.num_samples, key="method.max_phase_gb", max_gb=math.inf)
        self.assignments.own.fill_(-1)
        self.sums.make_room(self.config.clusters)
        self.head.make_room(self.config.clusters)
        self.centroids = self.centroids.new_zeros(self.config.clusters, self.config.embedding)

    def phase_due(self, step: int) -> bool:
        """Before the first step alone."""
        return step == 0

    def plain(self, images: Tensor) -> Tensor:
        """Embeddings: unit vectors [B, D], by BatchNorm's running statistics."""
        with running_statistics_used(self.modules()):
            return unit(self.projection(self.backbone(images)))

    @torch.no_grad()
    def phase(self, step: int, corpus: PlainEmbeddings, beat: Callable[[str], None]) -> dict[str, float]:
        """Fill memories, and draw the head.

        Collectives: those of `kmeans`, `beat`'s among them, of `mean_of_rows` and `SumsByCluster`, and of `agreement`.
        """
        for theirs, rows in centred(corpus):
            self.memory.own[theirs] = rows.to(self.memory.rows.dtype)
        before, met = self.assignments.own.clone(), self.memory.own.any(1)
        rows = self.memory.own[met]
        with clusters_found.blaming(self.config.clusters, step):
            clusters = kmeans(
                rows,
                self.config.clusters,
                seed=self._kmeans_seed(step, -1),
                iterations=self.config.kmeans_iterations,
                spherical=True,
                beat=beat,
            )
        self.assignments.own[met, 0] = clusters.assignments.to(torch.int32)
        self.sums.move_over_ranks(rows, torch.full_like(clusters.assignments, -1), clusters.assignments)
        self.centroids.copy_(clusters.centroids)
        self.sums.means_into(self.centroids)
        self.head.draw(self._seed, step)
        return clusters_found.found(before, self.assignments.own, [clusters.sizes], beat)

    def embed(self, views: Views) -> Named:
        """`embeddings` of all views, of any length, [V, B, D]; the head sees them all at once."""
        features = torch.cat([self.backbone(group) for group in views.images])
        return {"embeddings": self.projection(features).unflatten(0, (-1, len(views.ids)))}

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The loss of a batch, or of one of its micro-batches.

        Collectives: an all-gather of ids, all-reduces of their clusters and rows, all-gathers of new ones; in the last
        micro-batch one of the head's gradient; every `centroids_every` steps those of `_tend`.
        """
        if self.head.begins_a_step:  # all micro-batches of a step are weighted alike
            if step and step % self.config.centroids_every == 0:
                self._tend(step)
            self._sizes = self.sums.sizes.double()
        z = inputs["embeddings"]
        all_ids = gather_rows(ids)
        former = self.assignments.read(all_ids)
        own = slice(rank() * len(ids), (rank() + 1) * len(ids))
        sizes = self._sizes
        weights = sizes.clamp_min(1) ** -self.config.size_power
        weights *= sizes.sum() / (sizes * weights).sum()
        loss, picked = self.head.losses(z.flatten(0, 1), former[own, 0].long().repeat(len(z)), weights)
        moved = self._remember(unit(z.detach()).mean(0), all_ids, former[:, 0].long(), own)
        signs = {
            "cluster_picked": picked,
            "same_cluster": clusters_found.same_cluster(former, [self.config.clusters]),
            "moved": moved.to(picked.dtype),
            "small_clusters": (sizes < self.config.least_images).to(picked.dtype).mean(),
        }
        return Output(loss, signs, {})

    @torch.no_grad()
    def _remember(self, z: Tensor, all_ids: Tensor, former: Tensor, own: slice) -> Tensor:
        """Put the batch into the memories; returns the share of images that have left their cluster.

        Args:
            z: mean embedding of this rank's images, [B, D].
            all_ids, former: of the images of all ranks: numbers, and clusters so far.
            own: this rank's among them.
        """
        old, kept = self.memory.read(all_ids), self.config.momentum
        mine = unit(kept * old[own] + (1 - kept) * z).to(self.memory.rows.dtype)
        new, clusters = gather_rows(mine), gather_rows(nearest_centroids(mine, self.centroids))
        last = last_of_each(all_ids)  # of an image that comes twice, the one that is written
        self.memory.write(all_ids, new)
        self.assignments.write(all_ids, clusters[:, None].to(torch.int32))
        self.sums.subtract(old, torch.where(last, former, -1))
        self.sums.add(new, torch.where(last, clusters, -1))
        return (clusters != former).double().mean()

    @torch.no_grad()
    def _tend(self, step: int) -> None:
        """Compute centroids, and give small clusters half of the largest. The host waits for the device.

        Collectives: none where no cluster is small; else an all-reduce of K (D + 1) numbers, and for each small cluster
        another one, and those of a k-means over the largest.
        """
        self.sums.means_into(self.centroids)
        if is_fake(self.centroids):  # a plan, which does not know what is small
            return
        small = self.sums.sizes < self.config.least_images
        places = small.nonzero()[:, 0].tolist()
        if not places or len(places) == len(small):
            return
        clusters, large = self.assignments.own[:, 0].long(), (~small).nonzero()[:, 0]
        homeless = ((clusters >= 0) & small[clusters.clamp_min(0)]).nonzero()[:, 0]
        self._move(homeless, large[nearest_centroids(self.memory.own[homeless], self.centroids[large])])
        for place in places:
            largest = int(self.sums.sizes.cpu().numpy().argmax())
            members = (self.assignments.own[:, 0] == largest).nonzero()[:, 0]
            halves = kmeans(
                self.memory.own[members],
                2,
                seed=self._kmeans_seed(step, place),
                iterations=self.config.kmeans_iterations,
                spherical=True,
            )
            second = halves.assignments == 1
            self._move(members[second], torch.full_like(members[second], place))
        self.sums.means_into(self.centroids)

    def _move(self, places: Tensor, clusters: Tensor) -> None:
        """Give images at these places of this rank's range other clusters. Collectives: of `SumsByCluster`."""
        self.sums.move_over_ranks(self.memory.own[places], self.assignments.own[places, 0].long(), clusters)
        self.assignments.own[places, 0] = clusters.to(torch.int32)

    def _kmeans_seed(self, step: int, place: int) -> int:
        return clusters_found.kmeans_seed(self._seed, step, place + 1, _PURPOSE)

    def after_update(self, step: int) -> None:
        """Update the head."""
        self.head.update()

    def state(self, mesh: DeviceMesh) -> dict[str, Tensor]:
        """Memory and clusters of samples, sharded by id; sums, centroids and head, which all ranks hold."""
        same = {"centroids": self.centroids, "head": self.head.rows, **self.sums.by_name()}
        return {
            "memory": self.memory.tensor(mesh),
            "assignments": self.assignments.tensor(mesh),
            **{name: replicated(value, mesh) for name, value in same.items()},
        }

    def exemplar_scores(self, features: Tensor) -> list[Tensor]:
        """Cosines with the centroids."""
        z = unit(self.projection(features))
        return [z @ self.centroids.to(z.dtype).T]

    def measures(self, loss: float, signs: dict[str, Tensor], num_images: int) -> dict[str, float]:
        """Signs, and the loss over ln K."""
        over = {"loss_over_ln_k": loss / clusters_found.uniform_loss([self.config.clusters])}
        return over | super().measures(loss, signs, num_images)

    @classmethod
    def brief(cls, row: Row) -> str:
        """The loss as a share of that of uniform predictions."""
        return clusters_found.brief(row)

    @classmethod
    def suited(cls, config: Config, length: Length) -> dict[str, Choice]:
        """At most one cluster for every ten images, and what counts as few images in one."""
        [count], reason = clusters_found.suited([_settings(config).clusters], length)["clusters"]
        least = max(2, min(_settings(config).least_images, length.num_samples // count // _OF_THE_MEAN))
        return {
            "clusters": Choice(count, reason),
            "least_images": Choice(least, f"at most 1/{_OF_THE_MEAN} of the images of a cluster on average"),
        }

    @classmethod
    def loss_references(cls, config: Config) -> dict[str, float]:
        """The loss of uniform predictions."""
        return {"ln K (uniform predictions)": clusters_found.uniform_loss([_settings(config).clusters])}

    @classmethod
    def symptoms(cls, config: Config) -> list[Symptom]:
        """That one cluster holds most images, or that clusters are not learnt."""
        slower = f"Try, in another run.dir, optim.lr={config.optim.lr / 2:.2g} or a longer optim.warmup_epochs"
        faster = (
            f"Try, in another run.dir, method.head_lr={10 * _settings(config).head_lr:.2g} or fewer method.clusters"
        )
        return [
            clusters_found.one_for_most(slower, [_settings(config).clusters]),
            clusters_found.not_learnt(config, remedy=faster),
        ]

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """Clusters in steps, and how fast they change."""
        changing = {"share of images that leave their cluster": "moved", "share of small clusters": "small_clusters"}
        return [clusters_found.panels()[0], Panel("Clusters change", changing, limits=(0, 1.05))]


def _settings(config: Config) -> Settings:
    assert isinstance(config.method, Settings)
    return config.method
