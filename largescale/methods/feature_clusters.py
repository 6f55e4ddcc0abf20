"""Methods whose labels are clusters of the network's own features, found again by k-means every few epochs.

Features are those of images seen plainly: of the backbone, or of hidden layers on it, of the last one before its ReLU.
They are clustered as unit vectors of whitened principal components.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import relu

from largescale.clustering.kmeans import working_bytes
from largescale.clustering.whitening import whitened
from largescale.config import Config
from largescale.config.schema import MethodConfig
from largescale.config.setting import setting
from largescale.data.device_random import uniform
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.methods import clusters_found
from largescale.methods.choice import Choice
from largescale.methods.embedding_method import EmbeddingMethod, Named
from largescale.methods.method import Row
from largescale.methods.phase import PlainEmbeddings
from largescale.methods.rows_by_id import RowsById
from largescale.methods.state_size import bytes_per_number
from largescale.models.backbones import build_backbone
from largescale.models.evaluation_mode import running_statistics_used
from largescale.models.heads import hidden_widths, projection_head
from largescale.processes import world_size

PURPOSE = 45
"""Keeps the numbers that seed k-means and draw heads apart from others of the same seed and step."""
_DEVIATION = 0.01


@dataclass
class FeatureClustersSettings(MethodConfig):
    """Keys under `method` that such methods share."""

    hidden: list[int] = hidden_widths(
        (), of="what stands on the backbone, without BatchNorm; the last one, before its ReLU, is what is clustered"
    )
    clusters: int = setting(
        10000, "Number of clusters; 50 to 300 for tens of thousands of images.", at_least=2, at_most=2**31
    )
    components: int = setting(
        256, "Principal components of the features that are clustered.", at_least=1, at_most=2**24
    )
    recluster_epochs: int = setting(1, "Epochs from one k-means to the next.", at_least=1, at_most=10**9)
    kmeans_iterations: int = setting(20, "Iterations of a k-means, at most.", at_least=1, at_most=10**6)
    head_lr: float = setting(0.05, "Constant learning rate of the head, without momentum.", above=0, at_most=1e6)
    head_weight_decay: float = setting(1e-5, "Weight decay of the head.", at_least=0, at_most=1e6)
    max_phase_gb: float = clusters_found.max_phase_setting()


class FeatureClusters(EmbeddingMethod):
    """Backbone, hidden layers, and a cluster by sample id."""

    later_phases = True
    rates = ("head_lr",)
    weights: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.shared = settings_of(config)
        self.seed, self.micro_batches = config.run.seed, config.train.accumulate
        self.backbone, self.num_features = build_backbone(config.model)
        *hidden, self.width = self.shared.hidden or [self.num_features]
        if self.shared.hidden:
            self.projection = projection_head(self.num_features, hidden, self.width, batchnorm=False)
        self.assignments = RowsById(1, torch.int32)
        # The weight in the loss of each cluster's images, [K].
        self.register_buffer("weights", torch.zeros(0), persistent=False)

    @classmethod
    def misfit(cls, config: Config, length: Length) -> str:
        """There may be fewer images than clusters, or too many to cluster."""
        settings, images = settings_of(config), length.num_samples
        size = cls.phase_bytes(config, images)
        return clusters_found.misfit_of(settings.clusters, images, size, settings.max_phase_gb)

    def begin(self) -> None:
        """Make room for clusters."""
        self.assignments.make_room(self.length.num_samples, key="method.max_phase_gb", max_gb=math.inf)
        self.assignments.own.fill_(-1)
        self.weights = self.weights.new_zeros(self.shared.clusters)

    def phase_due(self, step: int) -> bool:
        """Before an epoch."""
        epoch, within = divmod(step, self.length.steps_per_epoch)
        return within == 0 and epoch % self.shared.recluster_epochs == 0

    def plain(self, images: Tensor) -> Tensor:
        """Features [B, F], by BatchNorm's running statistics."""
        with running_statistics_used(self.modules()):
            return self.project(self.backbone(images))

    def project(self, features: Tensor) -> Tensor:
        """What is clustered, [B, F], of backbone features; these themselves where nothing stands on the backbone."""
        found: Tensor = self.projection(features) if self.shared.hidden else features
        return found

    def points(self, corpus: PlainEmbeddings) -> Tensor:
        """What k-means is given, [n, C]. Collectives: those of `whitened`."""
        return whitened(corpus.vectors, self.shared.components)

    def kmeans_seed(self, step: int, *which: int) -> int:
        """Of a k-means before a step."""
        return clusters_found.kmeans_seed(self.seed, step, *which, PURPOSE)

    def embed(self, views: Views) -> Named:
        """`features` of all views, [V, B, F], as the head sees them."""
        features = self.project(torch.cat([self.backbone(group) for group in views.images]))
        features = relu(features) if self.shared.hidden else features
        return {"features": features.unflatten(0, (-1, len(views.ids)))}

    @classmethod
    def brief(cls, row: Row) -> str:
        """The loss as a share of that of uniform predictions."""
        return clusters_found.brief(row)

    @classmethod
    def suited(cls, config: Config, length: Length) -> dict[str, Choice]:
        """At most one cluster for every ten images."""
        [count], reason = clusters_found.suited([settings_of(config).clusters], length)["clusters"]
        return {"clusters": Choice(count, reason)}


def weights_of(sizes: Tensor) -> Tensor:
    """Weights of images by cluster such that all clusters with images count alike, and 1 on average: [K].

    Args:
        sizes: of the clusters, int64 [K].
    """
    exact = sizes.double()
    return torch.where(sizes > 0, exact.sum() / (sizes > 0).sum() / exact.clamp_min(1), 0)


def drawn_head(rows: Tensor, width: int, *, seed: int, step: int) -> Tensor:
    """Weights N(0, 0.01) and a bias of 0 of each row of a head, from (seed, step, row): float64 [n, width + 1].

    Args:
        rows: their numbers, int64 [n].
        width: of the features.
        seed, step: of the run.
    """
    draws = uniform(seed, step, PURPOSE, rows, num=width, device=rows.device)
    normal = torch.special.ndtri(draws.clamp_min(2.0**-54))
    return torch.cat([_DEVIATION * normal, normal.new_zeros(len(rows), 1)], dim=1)


def features_bytes(config: Config, images: int, clusters: int) -> int:
    """Most bytes that a rank holds in a phase of features, components, clusters, and what finds them.

    Args:
        config: of the run.
        images: of the corpus.
        clusters: that are found at a time.
    """
    settings, own, number = settings_of(config), -(-images // world_size()), bytes_per_number(config)
    width = head_width(config)
    components = min(settings.components, width)
    of_image = (width + components) * number + 2 * torch.int32.itemsize
    found = working_bytes(own, clusters, components, number)
    return own * of_image + 4 * width**2 * torch.float64.itemsize + found


def head_width(config: Config) -> int:
    """Width of what the head sees."""
    with torch.device("meta"):
        return [build_backbone(config.model)[1], *settings_of(config).hidden][-1]


def faster_head(settings: FeatureClustersSettings, otherwise: str = "fewer method.clusters") -> str:
    """What to try where clusters are not learnt: a head is drawn again with every clustering, and learns by its own
    rate until the next one.
    """
    return (
        f"Try, in another run.dir, method.head_lr={10 * settings.head_lr:.2g}, "
        f"method.recluster_epochs={3 * settings.recluster_epochs} or {otherwise}"
    )


def settings_of(config: Config) -> FeatureClustersSettings:
    """The settings that are shared."""
    assert isinstance(config.method, FeatureClustersSettings)
    return config.method
