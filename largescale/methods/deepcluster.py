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

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.functional import cross_entropy, relu

from largescale.clustering.kmeans import kmeans, working_bytes
from largescale.clustering.whitening import whitened
from largescale.config import Config
from largescale.config.schema import MethodConfig
from largescale.config.setting import setting
from largescale.data.device_random import uniform
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.distributed.collectives import exchanging, gather_rows
from largescale.methods import clusters_found
from largescale.methods.choice import Choice
from largescale.methods.embedding_method import EmbeddingMethod, Named
from largescale.methods.method import Output, Panel, Row, Sign, Symptom
from largescale.methods.phase import PlainEmbeddings
from largescale.methods.rows_by_id import RowsById
from largescale.methods.state_size import bytes_per_number
from largescale.models.backbones import build_backbone
from largescale.models.evaluation_mode import running_statistics_used
from largescale.models.heads import hidden_widths, projection_head
from largescale.processes import rank, world_size

_PURPOSE = 45
"""Keeps the numbers that seed k-means and draw heads apart from others of the same seed and step."""
_DEVIATION = 0.01
_ROWS = 1024
"""Of the head that are drawn together."""


@dataclass
class Settings(MethodConfig):
    """DeepCluster's keys under `method`."""

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


class DeepCluster(EmbeddingMethod):
    """Backbone, clusters by sample id, a head that is drawn again with them, and the loss over the views of a batch.
    Evidence: none.
    """

    title = "DeepCluster"
    reference = "deepcluster/resnet50_200ep"
    Settings = Settings
    head: Tensor
    weights: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = _settings(config)
        self._seed, self._micro_batches = config.run.seed, config.train.accumulate
        self.backbone, self.num_features = build_backbone(config.model)
        *hidden, self._width = self.config.hidden or [self.num_features]
        if self.config.hidden:
            self.projection = projection_head(self.num_features, hidden, self._width, batchnorm=False)
        self.assignments = RowsById(1, torch.int32)
        # W and b side by side, [K, F + 1]; weights of images by cluster, [K].
        self.register_buffer("head", torch.zeros(0, self._width + 1), persistent=False)
        self.register_buffer("weights", torch.zeros(0), persistent=False)
        self.signs = {"cluster_picked": Sign(), "same_cluster": Sign()}
        self._gradient: Tensor | None = None
        self._num_seen = 0

    @classmethod
    def misfit(cls, config: Config, length: Length) -> str:
        """There may be fewer images than clusters, or too many to cluster."""
        settings, images = _settings(config), length.num_samples
        size = cls.phase_bytes(config, images)
        return clusters_found.misfit_of(settings.clusters, images, size, settings.max_phase_gb)

    @classmethod
    def phase_bytes(cls, config: Config, images: int) -> int:
        """Most bytes that a rank holds in a phase beside networks: features, components, clusters, what finds them."""
        with torch.device("meta"):
            width = [build_backbone(config.model)[1], *_settings(config).hidden][-1]
        settings, own, number = _settings(config), -(-images // world_size()), bytes_per_number(config)
        components = min(settings.components, width)
        of_image = (width + components) * number + 2 * torch.int32.itemsize
        of_head = 3 * settings.clusters * (width + 1) * number
        found = working_bytes(own, settings.clusters, components, number)
        return own * of_image + of_head + 4 * width**2 * torch.float64.itemsize + found

    def begin(self) -> None:
        """Make room for clusters and head."""
        self.assignments.make_room(self.length.num_samples, key="method.max_phase_gb", max_gb=math.inf)
        self.assignments.own.fill_(-1)
        self.head = self.head.new_zeros(self.config.clusters, self._width + 1)
        self.weights = self.weights.new_zeros(self.config.clusters)

    def phase_due(self, step: int) -> bool:
        """Before an epoch."""
        epoch, within = divmod(step, self.length.steps_per_epoch)
        return within == 0 and epoch % self.config.recluster_epochs == 0

    def plain(self, images: Tensor) -> Tensor:
        """Features [B, F], by BatchNorm's running statistics."""
        with running_statistics_used(self.modules()):
            return self.project(self.backbone(images))

    def project(self, features: Tensor) -> Tensor:
        """What is clustered, [B, F], of backbone features; these themselves where nothing stands on the backbone."""
        found: Tensor = self.projection(features) if self.config.hidden else features
        return found

    @torch.no_grad()
    def phase(self, step: int, corpus: PlainEmbeddings, beat: Callable[[str], None]) -> dict[str, float]:
        """Cluster the corpus, and draw another head.

        Collectives: those of `whitened`, `kmeans`, `beat`'s among them, and `agreement`.
        """
        before, count = self.assignments.own.clone(), self.config.clusters
        with clusters_found.blaming(count, step):
            points = whitened(corpus.vectors, self.config.components)
            seed = int(uniform(self._seed, step, _PURPOSE, num=1, device=torch.device("cpu")) * 2**53)
            clusters = kmeans(points, count, seed=seed, iterations=self.config.kmeans_iterations, beat=beat)
        self.assignments.own.fill_(-1)
        self.assignments.own[corpus.readable, 0] = clusters.assignments.to(torch.int32)
        sizes = clusters.sizes.double()
        self.weights.copy_(torch.where(sizes > 0, sizes.sum() / (sizes > 0).sum() / sizes.clamp_min(1), 0))
        self._draw_head(step)
        return clusters_found.found(before, self.assignments.own, [clusters.sizes], beat)

    def _draw_head(self, step: int) -> None:
        """Weights N(0, 0.01) from (seed, step), biases 0."""
        for start in range(0, len(self.head), _ROWS):
            rows = torch.arange(start, min(start + _ROWS, len(self.head)), device=self.head.device)
            draws = uniform(self._seed, step, _PURPOSE, rows, num=self._width, device=rows.device)
            normal = torch.special.ndtri(draws.clamp_min(2.0**-54))
            self.head[rows, :-1] = (_DEVIATION * normal).to(self.head.dtype)
        self.head[:, -1] = 0

    def embed(self, views: Views) -> Named:
        """`features` of all views, [V, B, F], as the head sees them."""
        features = self.project(torch.cat([self.backbone(group) for group in views.images]))
        features = relu(features) if self.config.hidden else features
        return {"features": features.unflatten(0, (-1, len(views.ids)))}

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The loss of a batch, or of one of its micro-batches.

        Collectives: an all-gather of ids, an all-reduce of their clusters; in the last micro-batch one of the head's
        gradient.
        """
        assigned = self.assignments.read(gather_rows(ids))
        own = assigned[rank() * len(ids) :][: len(ids)].long()
        x = inputs["features"].flatten(0, 1)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, self.head.dtype))
            wanted = own[:, 0].repeat(len(x) // len(ids))
            weights = torch.where(wanted >= 0, self.weights[wanted.clamp_min(0)], 0).to(x.dtype)
            head = self.head.to(x.dtype)
            logits = torch.addmm(head[:, -1], x, head[:, :-1].T)
            losses = cross_entropy(logits, wanted, ignore_index=-1, reduction="none")
            self._add_gradient(logits.detach(), x.detach(), wanted, weights)
        picked = (logits.detach().argmax(1) == wanted).to(x.dtype).mean()
        signs = {
            "cluster_picked": picked,
            "same_cluster": clusters_found.same_cluster(assigned, [self.config.clusters]),
        }
        return Output((losses * weights).mean(), signs, {})

    @torch.no_grad()
    def _add_gradient(self, logits: Tensor, x: Tensor, wanted: Tensor, weights: Tensor) -> None:
        """The head's gradient of this micro-batch, averaged over all of the step and over ranks once it is the last."""
        wrong = torch.softmax(logits, 1)
        wrong[torch.arange(len(x), device=x.device), wanted.clamp_min(0)] -= 1
        wrong *= weights[:, None] / (len(x) * self._micro_batches * world_size())
        own = torch.cat([wrong.T @ x, wrong.sum(0)[:, None]], dim=1).to(self.head.dtype)
        self._gradient = own if self._gradient is None or self._num_seen == 0 else self._gradient + own
        self._num_seen = (self._num_seen + 1) % self._micro_batches
        if self._num_seen == 0 and world_size() > 1:
            with exchanging("gradient of the head"):
                dist.all_reduce(self._gradient)

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Update the head."""
        assert self._gradient is not None and self._num_seen == 0
        self._gradient += self.config.head_weight_decay * self.head
        self.head -= self.config.head_lr * self._gradient
        self._gradient = None

    def state(self, mesh: DeviceMesh) -> dict[str, Tensor]:
        """Clusters of images, sharded by id, and head and weights, which all ranks hold."""
        same = {"head": self.head, "weights": self.weights}
        return {
            "assignments": self.assignments.tensor(mesh),
            **{name: DTensor.from_local(value, mesh, [Replicate()], run_check=False) for name, value in same.items()},
        }

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
        """At most one cluster for every ten images."""
        [count], reason = clusters_found.suited([_settings(config).clusters], length)["clusters"]
        return {"clusters": Choice(count, reason)}

    @classmethod
    def loss_references(cls, config: Config) -> dict[str, float]:
        """The loss of uniform predictions."""
        return {"ln K (uniform predictions)": clusters_found.uniform_loss([_settings(config).clusters])}

    @classmethod
    def symptoms(cls, config: Config) -> list[Symptom]:
        """That one cluster holds most images, or that clusters are not learnt."""
        remedy = f"Try, in another run.dir, optim.lr={config.optim.lr / 2:.2g} or a longer optim.warmup_epochs"
        settings = _settings(config)
        # The head is drawn again with every clustering, and learns by its own rate until the next one.
        faster = (
            f"Try, in another run.dir, method.head_lr={10 * settings.head_lr:.2g}, "
            f"method.recluster_epochs={3 * settings.recluster_epochs} or fewer method.clusters"
        )
        return [
            clusters_found.one_for_most(remedy, [settings.clusters]),
            clusters_found.not_learnt(config, remedy=faster),
        ]

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """Clusters in steps and in phases."""
        return clusters_found.panels()


def _settings(config: Config) -> Settings:
    assert isinstance(config.method, Settings)
    return config.method
