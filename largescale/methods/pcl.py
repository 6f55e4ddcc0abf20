"""PCL: MoCo, and besides each query picks the cluster of its image among others (arXiv 2005.04966).

Before an epoch the key network embeds every image, each once and plainly, and k-means finds M sets of K[m] clusters,
finer and finer; of several starts the best counts. Of an image i, s[m][i] is its cluster, c[m] the centroids at length
1, phi[m] how spread out each cluster is. The naive loop::

    loss = MoCo's
    for m in range(M):
        others = r clusters at random                               # the same ones for all images of a step
        for i in images:
            mine = exp(q[i] @ c[m][s[m][i]] / phi[m][s[m][i]])
            wrong = [exp(q[i] @ c[m][o] / phi[m][o]) for o in others if o != s[m][i]]
            loss += -log(mine / (mine + sum(wrong))) / N / M

    phi of a cluster of n > 1 images = mean distance to its centroid / log(n + smoothing)
    phi of others = the largest of these
    phi = phi, clipped to its 10th and 90th percentile, scaled so that its mean is the temperature

Departures from the published code. A cluster is never wrong for an image of its own, whereas there the clusters of all
images of the batch are candidates, so that two of one cluster get it as right and as wrong; and r may be as large as K.
Clusters at random are drawn from (seed, step), not by each GPU. All ranks share the k-means, and what comes of it is
part of a checkpoint; there it is lost with a run that stops within an epoch. Images that cannot be read in a phase have
no cluster until the next one, and count as zero here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import normalize

from largescale.clustering.fixed_point import sums_by_group
from largescale.clustering.kmeans import Clusters, kmeans, working_bytes
from largescale.config import Config
from largescale.config.setting import setting
from largescale.data.device_random import uniform
from largescale.data.length import Length
from largescale.distributed.collectives import gather_rows
from largescale.methods import clusters_found
from largescale.methods.choice import Choice
from largescale.methods.embedding_method import Named
from largescale.methods.joint_embedding import unit
from largescale.methods.losses.log_sum import log_sum_exp
from largescale.methods.losses.picks import Picks
from largescale.methods.method import Exemplars, Output, Panel, Row, Sign
from largescale.methods.moco import MoCo, MoCoSettings
from largescale.methods.phase import PlainEmbeddings
from largescale.methods.replicated import replicated
from largescale.methods.rows_by_id import RowsById
from largescale.methods.state_size import bytes_per_number
from largescale.processes import rank, world_size

_PURPOSE = 42
"""Keeps the numbers that choose clusters at random apart from others of the same seed and step."""
_LEAST = 0.01
"""Of the mean, the least phi: clusters of copies have none, and would be divided by it."""
_LATE = 0.5
_BESIDE = 32
"""Bytes per image: its id, and whether it could be read."""


@dataclass
class Settings(MoCoSettings):
    """PCL's keys under `method`."""

    temperature: float = setting(
        0.2, "Divides cosines before the softmax; of clusters, on average.", at_least=1e-6, at_most=1e6
    )
    clusters: list[int] = setting(
        [25000, 50000, 100000],
        "Numbers of clusters, each a k-means of its own; 100 to 1000 for tens of thousands of images.",
        at_least=2,
        at_most=2**31,
        min_length=1,
        expected="numbers of at least 2",
    )
    wrong_clusters: int = setting(
        16384,
        "Clusters at random that an image's own is picked among; all if there are fewer.",
        at_least=2,
        at_most=2**31,
    )
    warmup_epochs: int = setting(20, "Epochs of MoCo alone at the start.", at_least=0, at_most=10**9)
    recluster_epochs: int = setting(1, "Epochs from one k-means to the next.", at_least=1, at_most=10**9)
    kmeans_iterations: int = setting(20, "Iterations of a k-means, at most.", at_least=1, at_most=10**6)
    kmeans_restarts: int = setting(
        5, "Times that each k-means starts; that with the smallest inertia counts.", at_least=1, at_most=1000
    )
    smoothing: float = setting(
        10.0, "Added to the size of a cluster before its logarithm divides its spread.", above=1, at_most=1e9
    )
    max_phase_gb: float = clusters_found.max_phase_setting()


class PCL(MoCo):
    """MoCo, and clusters of the corpus with which its queries are compared.

    Version 1 has a linear head, `hidden: []`, version 2 that of MoCo v2.
    """

    title = "PCL"
    reference = "pcl/resnet50_v2_200ep"
    Settings = Settings
    later_phases = True
    exemplars: ClassVar[Exemplars] = Exemplars("cluster", "What clusters stand for")
    exemplar_state = ("centroids",)
    centroids: Tensor
    spreads: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.method, Settings)
        self._clustering = config.method
        self._run_seed, self._counts = config.run.seed, config.method.clusters
        self.assignments = RowsById(len(self._counts), torch.int32)
        # Of all sets of clusters, one after the other: [sum of K, D], [sum of K].
        self.register_buffer("centroids", torch.zeros(0, config.method.embedding), persistent=False)
        self.register_buffer("spreads", torch.zeros(0), persistent=False)
        self.signs |= {"cluster_picked": Sign()}

    @classmethod
    def misfit(cls, config: Config, length: Length) -> str:
        """There may be fewer images than clusters, or too many to cluster."""
        settings, images = config.method, length.num_samples
        assert isinstance(settings, Settings)
        size = cls.phase_bytes(config, images)
        return clusters_found.misfit_of(settings.clusters, images, size, settings.max_phase_gb)

    @classmethod
    def phase_bytes(cls, config: Config, images: int) -> int:
        """Most bytes that a rank holds in a phase beside networks and activations: embeddings, once; clusters; and what
        finds them, but for blocks of a hundred MB at most.
        """
        settings, own, number = config.method, -(-images // world_size()), bytes_per_number(config)
        assert isinstance(settings, Settings)
        width, counts = settings.embedding, settings.clusters
        of_image = width * number + len(counts) * torch.int32.itemsize + _BESIDE
        of_clusters = sum(counts) * (width + 1) * number
        return own * of_image + of_clusters + working_bytes(own, max(counts), width, number)

    def begin(self) -> None:
        """Make room for clusters, and for those of each image."""
        self.assignments.make_room(self.length.num_samples, key="method.max_phase_gb", max_gb=math.inf)
        self.centroids = self.centroids.new_zeros(sum(self._counts), self.config.embedding)
        self.spreads = self.spreads.new_ones(sum(self._counts))

    def phase_due(self, step: int) -> bool:
        """Before an epoch, once MoCo alone has warmed up."""
        epoch, within = divmod(step, self.length.steps_per_epoch)
        since = epoch - self._clustering.warmup_epochs
        return within == 0 and since >= 0 and since % self._clustering.recluster_epochs == 0

    def plain(self, images: Tensor) -> Tensor:
        """Keys of images: unit vectors [B, D]."""
        return unit(self.teacher["projection"](self.teacher["backbone"](images)))

    @torch.no_grad()
    def phase(self, step: int, corpus: PlainEmbeddings, beat: Callable[[str], None]) -> dict[str, float]:
        """Cluster the corpus.

        Collectives: those of `kmeans`, `beat`'s among them, and `sums_by_group`, once per set of clusters.
        """
        points, found = corpus.vectors.to(self.centroids.dtype), {}  # no copy, where keys are in float32 as usual
        self.assignments.own.fill_(-1)
        for number, centroids in enumerate(self.centroids.split(self._counts)):
            clusters = self._clusters(points, len(centroids), step, number, beat)
            centroids.copy_(normalize(clusters.centroids, dim=1))
            self.spreads.split(self._counts)[number].copy_(self._spread(clusters))
            self.assignments.own[corpus.readable, number] = clusters.assignments.to(torch.int32)
            found[f"clusters_used_{len(centroids)}"] = float((clusters.sizes > 0).double().mean())
        return found

    def _clusters(self, points: Tensor, count: int, step: int, number: int, beat: Callable[[str], None]) -> Clusters:
        with clusters_found.blaming(self._counts, step):
            return kmeans(
                points,
                count,
                seed=clusters_found.kmeans_seed(self._run_seed, step, number, _PURPOSE),
                iterations=self._clustering.kmeans_iterations,
                restarts=self._clustering.kmeans_restarts,
                beat=beat,
            )

    def _spread(self, clusters: Clusters) -> Tensor:
        """phi of each cluster, [K]. Collectives: those of `sums_by_group`."""
        sizes = clusters.sizes
        sums = sums_by_group(clusters.distances, clusters.assignments, len(sizes))
        phi = sums / sizes.clamp_min(1) / (sizes.double() + self._clustering.smoothing).log()
        phi = torch.where(sizes > 1, phi, torch.where(sizes > 1, phi, 0).max())
        phi = phi.clamp(torch.quantile(phi, 0.1), torch.quantile(phi, 0.9))
        if not float(phi.mean()) > 0:  # as many clusters as images
            return torch.full_like(phi, self.config.temperature)
        phi = phi.clamp_min(_LEAST * float(phi.mean()))
        return self.config.temperature * phi / phi.mean()

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """MoCo's loss and, once there are clusters, that of picking one's own.

        Collectives: MoCo's; then also an all-gather of ids, and an all-reduce of their clusters.
        """
        output = super().loss(inputs, ids, step)
        signs = output.signs | {"cluster_picked": output.loss.detach().new_zeros(())}
        if step < self._clustering.warmup_epochs * self.length.steps_per_epoch:
            return output._replace(signs=signs)
        queries = inputs["queries"]
        own = self.assignments.read(gather_rows(ids))[rank() * len(ids) :][: len(ids)].long()
        with torch.autocast(queries.device.type, enabled=False):
            found = [self._among_clusters(queries, own[:, number], number, step) for number in range(len(self._counts))]
        losses, picked = (torch.stack(values) for values in zip(*found, strict=True))
        return output._replace(loss=output.loss + losses.mean(), signs=signs | {"cluster_picked": picked.mean()})

    def _among_clusters(self, queries: Tensor, own: Tensor, number: int, step: int) -> tuple[Tensor, Tensor]:
        """Loss of one set of clusters, and the share of queries that pick their own.

        Args:
            queries: [V, B, D].
            own: cluster of each image, -1 for none, int64 [B].
            number: of the set.
            step: of the run.
        """
        centroids = self.centroids.split(self._counts)[number].to(queries.dtype)
        spreads = self.spreads.split(self._counts)[number].to(queries.dtype)
        draws = uniform(self._run_seed, step, number, _PURPOSE, num=len(centroids), device=queries.device)
        others = draws.topk(min(len(draws), self._clustering.wrong_clusters), largest=False, sorted=False).indices
        # Where each cluster is among the others; nowhere for most.
        places = torch.full_like(draws, -1, dtype=torch.int64).index_put_(
            (others,), torch.arange(len(others), device=draws.device)
        )
        mine = own.clamp_min(0)
        right = (queries * centroids[mine]).sum(-1) / spreads[mine]
        candidates = centroids.index_select(0, others) / spreads[others, None]
        picks = Picks(
            right.flatten()[:, None], *log_sum_exp(queries.flatten(0, 1), candidates, places[mine].repeat(len(queries)))
        )
        has_one = (own >= 0).to(queries.dtype).repeat(len(queries))
        picked = (picks.right[:, 0] > picks.best).to(queries.dtype)
        return (picks.losses() * has_one[:, None]).mean(), (picked * has_one).sum() / has_one.sum().clamp_min(1)

    def exemplar_scores(self, features: Tensor) -> list[Tensor]:
        """Cosines with the centroids of each set of clusters; they are of keys, which queries are to equal."""
        z = unit(self.projection(features))
        return [z @ centroids.T for centroids in self.centroids.to(z.dtype).split(self._counts)]

    def state(self, mesh: DeviceMesh) -> dict[str, Tensor]:
        """Also centroids and spreads, which all ranks hold, and the clusters of each image, sharded by id."""
        same = {"centroids": self.centroids, "spreads": self.spreads}
        return {
            **super().state(mesh),
            **{name: replicated(value, mesh) for name, value in same.items()},
            "assignments": self.assignments.tensor(mesh),
        }

    @classmethod
    def suited(cls, config: Config, length: Length) -> dict[str, Choice]:
        """Also at most one cluster for every ten images, and MoCo alone for a tenth of the run, but for an epoch at
        least: before the first step BatchNorm's statistics mean nothing, and keys are nearly one vector.
        """
        settings, epochs = config.method, length.num_steps / length.steps_per_epoch
        assert isinstance(settings, Settings)
        clusters = clusters_found.suited(settings.clusters, length)
        return (
            super().suited(config, length)
            | clusters
            | {"warmup_epochs": Choice(min(settings.warmup_epochs, _warmup(epochs)), "a tenth of the run at most")}
        )

    @classmethod
    def without_start(cls) -> dict[str, Any]:
        """Clusters from the first step on."""
        return {"warmup_epochs": 0}

    @classmethod
    def complaints(cls, config: Config, length: Length) -> list[str]:
        """Also whether clusters come too late to matter."""
        assert isinstance(config.method, Settings)
        warmup, epochs = config.method.warmup_epochs, length.num_steps / length.steps_per_epoch
        if warmup <= _LATE * epochs:
            return super().complaints(config, length)
        less = f"set method.warmup_epochs={_warmup(epochs)}, or " if warmup > _warmup(epochs) else ""
        late = (
            f"method.warmup_epochs={warmup}: clusters take part only after it, and the run has {epochs:.3g} epochs; "
            f"{less}train longer"
        )
        return [late, *super().complaints(config, length)]

    @classmethod
    def loss_references(cls, config: Config) -> dict[str, float]:
        """MoCo's, and with the clusters that are added."""
        assert isinstance(config.method, Settings)
        moco = super().loss_references(config)["all views alike"]
        wrong = [min(count, config.method.wrong_clusters) for count in config.method.clusters]
        return {"all views alike, no clusters": moco, "with clusters": moco + sum(map(math.log, wrong)) / len(wrong)}

    @classmethod
    def loss_of_guesses(cls, config: Config, row: Row) -> float:
        """MoCo's alone until there are clusters."""
        assert isinstance(config.method, Settings)
        without, with_clusters = cls.loss_references(config).values()
        return without if row.get("epoch", math.inf) <= config.method.warmup_epochs else with_clusters

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """How well queries find their clusters, before MoCo's panels."""
        found = Panel("Clusters", {"share of queries that pick their own": "cluster_picked"}, limits=(0, 1.05))
        return [found, *super().panels(config)]


def _warmup(epochs: float) -> int:
    """Epochs that suit a run of so many."""
    return max(1, int(epochs / 10))
