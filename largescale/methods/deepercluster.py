"""DeeperCluster: turned images are classified in two levels, by turn and coarse cluster, and by fine cluster
(arXiv 1905.01278).

m super-clusters times four turns are super-classes; each has a layer of its own for the K / m clusters within. With
c[i] the super-cluster of image i, k[i] its cluster there, n its size, N all images. The naive loop::

    before some epochs:
        x = features of all images, seen plainly and upright; of hidden layers, before the last ReLU
        y = whitened principal components of x, as unit vectors
        c = kmeans(y, m), the best of 5 starts
        for s in range(m):
            k[c == s] = kmeans(y[c == s], K / m)
        V, W = N(0, 0.01), biases a, b = 0
    in each step:
        for i in images:
            weight = N / (m' K'[c[i]] n[c[i]][k[i]])            # m', K': super-clusters, clusters there, with images
            weight = min(weight, N / K)                         # then scaled to 1 on average
            for view in views of i:
                turn = one of four, at random                   # or each of them
                s, x = turn m + c[i], features(rot90(view, turn))
                loss += -log softmax(V x + a)[s] weight / B / V
                loss += -log softmax(W[s] x + b[s])[k[i]] weight / B / V
        V, W = V, W - head_lr (their gradient + head_weight_decay V, W)

The published code gives each super-class to a group of GPUs, which sees its images in its turn alone. So it needs at
least 16 GPUs, and BatchNorm over all of them, since statistics of a group would tell its turn. Here any rank draws any
image and turn, and the rows of V and W are split over ranks (see `split_head`): any number of ranks has the same loss.

Departures from the published code, besides: images are weighted where there clusters are drawn equally often; a
super-cluster with fewer images than it would have clusters gets one cluster for each, and no image weighs more than
N / K, as the only one of its cluster does where all clusters have images; heads are drawn with a standard deviation of
0.01 and trained without momentum, as DeepCluster's, so that published rates are to be multiplied by ten; clusters
and heads are part of a checkpoint, where there a run that stops clusters again. As in DeepCluster, clusters found
on another number of ranks may differ for images that are as near to one as to another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from largescale.clustering.kmeans import kmeans
from largescale.config import Config, require
from largescale.config.setting import setting
from largescale.data.length import Length
from largescale.data.task_views.rotation import NUM_TURNS
from largescale.data.views import Views
from largescale.distributed.collectives import gather_rows
from largescale.methods import clusters_found
from largescale.methods.choice import Choice
from largescale.methods.embedding_method import Named
from largescale.methods.feature_clusters import (
    FeatureClusters,
    FeatureClustersSettings,
    faster_head,
    features_bytes,
    head_width,
    weights_of,
)
from largescale.methods.float32 import at_least_float32
from largescale.methods.method import Output, Panel, Row, Sign, Symptom
from largescale.methods.phase import PlainEmbeddings
from largescale.methods.replicated import replicated
from largescale.methods.rotation import turned_views, turns_setting, turns_unclear
from largescale.methods.split_head import Asked, SplitHead
from largescale.methods.state_size import bytes_per_number
from largescale.processes import world_size

_STARTS = 5
"""Starts of the k-means of super-clusters: with so few centroids they cost little, and one bad start would spoil all
that follows."""

_ROUNDED = 1 + 1e-9


@dataclass
class Settings(FeatureClustersSettings):
    """DeeperCluster's keys under `method`."""

    clusters: int = setting(
        320000,
        "Number of clusters, as many within each super-cluster; 50 to 300 for tens of thousands of images.",
        at_least=2,
        at_most=2**31,
    )
    super_clusters: int = setting(4, "Clusters of the first level.", at_least=1, at_most=10**6)
    components: int = setting(
        4096, "Principal components of the features that are clustered.", at_least=1, at_most=2**24
    )
    recluster_epochs: int = setting(3, "Epochs from one k-means to the next.", at_least=1, at_most=10**9)
    kmeans_iterations: int = setting(10, "Iterations of a k-means, at most.", at_least=1, at_most=10**6)
    head_lr: float = setting(
        1.0,
        "Constant learning rate of the heads, without momentum; 10 times what it is with 0.9.",
        above=0,
        at_most=1e6,
    )
    turns: str = turns_setting("one")

    def check(self, config: Config) -> None:
        """As many clusters, at least two, in each super-cluster; one crop group, as large views have clusters."""
        require(
            self.clusters % self.super_clusters == 0 and self.clusters >= 2 * self.super_clusters,
            "method.clusters",
            self.clusters,
            f"a multiple of method.super_clusters={self.super_clusters}, at least twice as many",
        )
        groups = config.data.crops
        require(
            len(groups) == 1,
            "data.crops",
            f"groups of {', '.join(str(group.size) for group in groups)} px",
            f"one group with method.name={config.method.name}: a small crop does not show what its image's cluster is",
        )


class DeeperCluster(FeatureClusters):
    """Backbone, clusters of two levels by sample id, heads that are drawn again with them, and the loss over turned
    views. Evidence: none.
    """

    title = "DeeperCluster"
    reference = "deepercluster/resnet50_100ep"
    Settings = Settings
    square_crops = True  # squeezed views tell a quarter from a half turn, unless images are square

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = _settings(config)
        self._coarse, self._fine = self.config.super_clusters, self.config.clusters // self.config.super_clusters
        self._num_super = NUM_TURNS * self._coarse
        groups = [self._fine] * self._num_super + [self._num_super]
        self.heads = SplitHead(self.width, groups, self.micro_batches)
        self.signs = {
            name: Sign()
            for name in (
                "super_loss",
                "sub_loss",
                "super_class_picked",
                "cluster_picked",
                "same_super_cluster",
                "same_cluster",
            )
        }

    @classmethod
    def phase_bytes(cls, config: Config, images: int) -> int:
        """Most bytes that a rank holds in a phase beside networks: also components of a super-cluster, and its part of
        the heads with what draws them.
        """
        settings, number = _settings(config), bytes_per_number(config)
        width = head_width(config)
        rows = -(-NUM_TURNS * (settings.clusters + settings.super_clusters) // world_size())
        copy = -(-images // world_size()) * min(settings.components, width) * number
        at_a_time = max(settings.super_clusters, settings.clusters // settings.super_clusters)
        return features_bytes(config, images, at_a_time) + copy + 2 * rows * (width + 1) * number

    def begin(self) -> None:
        """Make room for clusters and heads."""
        super().begin()
        self.heads.make_room()

    @torch.no_grad()
    def phase(self, step: int, corpus: PlainEmbeddings, beat: Callable[[str], None]) -> dict[str, float]:
        """Cluster the corpus in two levels, and draw other heads.

        Collectives: those of `whitened`, of `kmeans` for all and for each super-cluster, `beat`'s among them, and those
        of `agreement`, twice.
        """
        before = self.assignments.own.clone()
        with clusters_found.blaming(self.config.clusters, step):
            found, sizes = self._clusters(self.points(corpus), step, beat)
        self.assignments.own.fill_(-1)
        self.assignments.own[corpus.readable, 0] = found.to(torch.int32)
        self.weights.copy_(self._weights(sizes))
        self.heads.draw(self.seed, step)
        after = self.assignments.own
        of_coarse = clusters_found.found(self._coarse_of(before), self._coarse_of(after), [sizes.sum(1)], beat)
        return {
            **{f"super_{name}": value for name, value in of_coarse.items()},
            **clusters_found.found(before, after, [sizes.flatten()], beat),
        }

    def _clusters(self, points: Tensor, step: int, beat: Callable[[str], None]) -> tuple[Tensor, Tensor]:
        """Cluster of each of this rank's points, of which each super-cluster has K / m in a row, int64 [n]; and sizes
        over all ranks, [m, K / m].
        """
        iterations = self.config.kmeans_iterations
        seed = self.kmeans_seed(step, 0)
        coarse = kmeans(points, self._coarse, seed=seed, iterations=iterations, restarts=_STARTS, beat=beat)
        found = coarse.assignments * self._fine
        sizes = coarse.sizes.new_zeros(self._coarse, self._fine)
        for number, size in enumerate(coarse.sizes.tolist()):
            count, mine = min(self._fine, size), coarse.assignments == number
            if count == 0:
                continue
            seed = self.kmeans_seed(step, 1 + number)
            fine = kmeans(points[mine], count, seed=seed, iterations=iterations, beat=beat)
            found[mine] += fine.assignments
            sizes[number, :count] = fine.sizes
        return found, sizes

    def _coarse_of(self, clusters: Tensor) -> Tensor:
        """Super-clusters of clusters, -1 of -1."""
        return torch.div(clusters, self._fine, rounding_mode="floor")

    def _weights(self, sizes: Tensor) -> Tensor:
        """Weights of images by cluster, [K]: super-clusters count alike, and so do clusters within each, but for
        super-clusters of few images: no image of N weighs more than N / K.
        """
        of_coarse, own, total = weights_of(sizes.sum(1)), sizes.flatten(), int(sizes.sum())
        weights = torch.cat([weight * weights_of(of_fine) for weight, of_fine in zip(of_coarse, sizes, strict=True)])
        most = total / self.config.clusters
        if not bool((weights > most * _ROUNDED).any()):
            return weights
        weights = weights.clamp_max(most)
        return weights * (total / (weights * own).sum())

    def task_views(self, views: Views, step: int) -> Views:
        """Views turned, and by how many quarters."""
        return turned_views(views, self.config.turns, seed=self.seed, step=step)

    def targets(self, views: Views) -> Named:
        """`turns` of all views, int64 [V, B]."""
        return {"turns": views.facts["turns"]}

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The loss of a batch, or of one of its micro-batches.

        Collectives: an all-gather of ids and turns, an all-reduce of clusters; those of `SplitHead`.
        """
        known = gather_rows(torch.cat([ids[:, None], inputs["turns"].T], dim=1))  # [ranks * B, 1 + V]
        assigned = self.assignments.read(known[:, 0])
        # In the order of features: rank after rank, view after view.
        turns = known[:, 1:].unflatten(0, (world_size(), -1)).transpose(1, 2).flatten()
        own = assigned[:, 0].long().unflatten(0, (world_size(), 1, -1))
        clusters = own.expand(-1, len(inputs["turns"]), -1).flatten()
        weights = torch.where(clusters >= 0, self.weights[clusters.clamp_min(0)], 0)
        coarse, fine = clusters.clamp_min(0) // self._fine, clusters.clamp_min(0) % self._fine
        super_class = turns * self._coarse + coarse
        asked = [Asked(torch.full_like(turns, self._num_super), super_class), Asked(super_class, fine)]
        x = inputs["features"].flatten(0, 1)
        with torch.autocast(x.device.type, enabled=False):
            x = at_least_float32(x)
            answers = self.heads(x, weights.to(x.dtype), asked)
        signs = {
            "super_loss": answers.losses[0],
            "sub_loss": answers.losses[1],
            "super_class_picked": answers.right[0],
            "cluster_picked": answers.right[1],
            "same_super_cluster": clusters_found.same_cluster(self._coarse_of(assigned), [self._coarse]),
            "same_cluster": clusters_found.same_cluster(assigned, [self.config.clusters]),
        }
        return Output(answers.loss, signs, {})

    def after_update(self, step: int) -> None:
        """Update the heads."""
        self.heads.update(self.config.head_lr, self.config.head_weight_decay)

    def state(self, mesh: DeviceMesh) -> dict[str, Tensor]:
        """Clusters of images, sharded by id; heads, sharded by row; and weights, which all ranks hold."""
        return {
            "assignments": self.assignments.tensor(mesh),
            "heads": self.heads.tensor(mesh),
            "weights": replicated(self.weights, mesh),
        }

    def measures(self, loss: float, signs: dict[str, Tensor], num_images: int) -> dict[str, float]:
        """Signs, and the loss over that of uniform predictions."""
        return {"loss_over_ln_k": loss / _uniform_loss(self.config)} | super().measures(loss, signs, num_images)

    @classmethod
    def suited(cls, config: Config, length: Length) -> dict[str, Choice]:
        """At most one cluster for every ten images, as many in each super-cluster."""
        choice, coarse = super().suited(config, length)["clusters"], _settings(config).super_clusters
        return {"clusters": choice._replace(value=max(2, int(choice.value) // coarse) * coarse)}

    @classmethod
    def complaints(cls, config: Config, length: Length) -> list[str]:
        """Also whether turns can be seen."""
        return [*turns_unclear(config), *super().complaints(config, length)]

    @classmethod
    def loss_references(cls, config: Config) -> dict[str, float]:
        """The loss of uniform predictions."""
        return {"ln 4m + ln K/m (uniform predictions)": _uniform_loss(_settings(config))}

    @classmethod
    def symptoms(cls, config: Config) -> list[Symptom]:
        """That one cluster, or super-cluster, holds most images, or that either level is not learnt."""
        remedy = f"Try, in another run.dir, optim.lr={config.optim.lr / 2:.2g} or a longer optim.warmup_epochs"
        settings = _settings(config)
        coarse = clusters_found.one_for_most(
            f"{remedy}, or fewer method.super_clusters",
            [max(2, settings.super_clusters)],
            "same_super_cluster",
            "super-cluster",
        )
        return [
            *([coarse] if settings.super_clusters > 1 else []),
            clusters_found.one_for_most(remedy, [settings.clusters]),
            clusters_found.not_learnt(
                config,
                faster_head(
                    settings, "fewer method.super_clusters" if settings.super_clusters > 1 else "method.turns=all"
                ),
                what="super-classes",
                column="super_loss",
                uniform=(_uniform_super_loss(settings), "ln 4m"),
            ),
            clusters_found.not_learnt(
                config, faster_head(settings), column="sub_loss", uniform=(_uniform_sub_loss(settings), "ln K/m")
            ),
        ]

    @classmethod
    def brief(cls, row: Row) -> str:
        """The loss as a share of that of uniform predictions, ln 4m + ln K/m."""
        return clusters_found.brief(row, "ln 4K")

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """Both levels in steps and in phases."""
        return [
            Panel(
                "Super-classes",
                {
                    "share of views that pick theirs": "super_class_picked",
                    "probability that two images are in one super-cluster": "same_super_cluster",
                },
                limits=(0, 1.05),
            ),
            Panel("Losses of both levels", {"super-class": "super_loss", "cluster within it": "sub_loss"}),
            *clusters_found.panels("share of views that pick their image's cluster among those of its super-class"),
            Panel(
                "Super-clusters from phase to phase",
                {
                    "normalised mutual information with the last ones": "super_cluster_nmi",
                    "share of images reassigned": "super_reassigned",
                },
                limits=(0, 1.05),
            ),
        ]


def _uniform_loss(settings: Settings) -> float:
    return _uniform_super_loss(settings) + _uniform_sub_loss(settings)


def _uniform_super_loss(settings: Settings) -> float:
    return math.log(NUM_TURNS * settings.super_clusters)


def _uniform_sub_loss(settings: Settings) -> float:
    return math.log(settings.clusters / settings.super_clusters)


def _settings(config: Config) -> Settings:
    assert isinstance(config.method, Settings)
    return config.method
