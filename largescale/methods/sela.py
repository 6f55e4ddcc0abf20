"""SeLa: labels that a network gives its images itself, equally many of each, are what it learns (arXiv 1911.05371).

Each head h has K[h] outputs and a label s[h][i] of every image. The naive loop::

    s[h] = balanced labels at random
    in each step:
        for h in range(H):
            for i in images:
                for x in the features of views of i:
                    loss += -log softmax(head[h](x))[s[h][i]] / H / B / V
    before some steps:
        x = features of all images, seen plainly                    # once for all heads
        for h in range(H):
            s[h] = argmax of Q, where Q = diag(alpha) softmax(head[h](x))^power diag(beta) has equal sums

See `clustering.optimal_transport`. Labels are found again before steps T (i / (n + 1))^2 for i = 1 to n, T steps in
all, rounded down, where they are not 0: often at the start, seldom in the end. Heads keep their weights, since outputs
keep their meaning.

Departures from the published code: there the first labels are found before the first step; here never before it, as
BatchNorm's running statistics mean nothing yet. Images that cannot be read in a phase keep their labels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import cross_entropy

from largescale.clustering.optimal_transport import equal_clusters, working_bytes
from largescale.config import Config
from largescale.config.schema import MethodConfig
from largescale.config.setting import setting
from largescale.data.length import Length
from largescale.data.random import hash_coordinates, permute
from largescale.data.views import Views
from largescale.distributed.collectives import gather_rows
from largescale.methods import clusters_found
from largescale.methods.choice import Choice
from largescale.methods.embedding_method import EmbeddingMethod, Named
from largescale.methods.method import Exemplars, Output, Panel, Row, Sign, Symptom
from largescale.methods.phase import PlainEmbeddings
from largescale.methods.rows_by_id import RowsById
from largescale.methods.state_size import bytes_per_number
from largescale.models.backbones import build_backbone
from largescale.models.evaluation_mode import running_statistics_used
from largescale.processes import rank, world_size

_PURPOSE = 44
"""Keeps the permutations of the first labels apart from others of the same seed."""
_SCALE = 2.0**8
_PER_EPOCH = 4
"""Solves at most: each embeds every image without a gradient, so these take about as long as training."""

_log = logging.getLogger(__name__)


@dataclass
class Settings(MethodConfig):
    """SeLa's keys under `method`."""

    clusters: list[int] = setting(
        [3000] * 10,
        "Numbers of labels, a head with labels of its own for each; 50 to 300 for tens of thousands of images.",
        at_least=2,
        at_most=2**31,
        min_length=1,
        expected="numbers of at least 2",
    )
    solves: int = setting(
        100, "Times that labels are found again, often at first and seldom in the end.", at_least=1, at_most=10**6
    )
    power: float = setting(
        25.0, "Of probabilities, where labels are found; larger is closer to the likeliest label.", above=0, at_most=1e6
    )
    tolerance: float = setting(
        0.1,
        "Labels are found once an iteration changes the scales of all images by less than this in sum, relatively.",
        above=0,
        at_most=1e6,
    )
    solve_iterations: int = setting(1000, "Iterations to find labels, at most.", at_least=2, at_most=10**7)
    max_phase_gb: float = clusters_found.max_phase_setting()


class SeLa(EmbeddingMethod):
    """Backbone, linear heads, labels by sample id, and the loss over the views of a batch. Evidence: none."""

    title = "SeLa"
    reference = "sela/resnet50_10x3000"
    Settings = Settings
    later_phases = True
    exemplars: ClassVar[Exemplars] = Exemplars("cluster", "What labels stand for")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = _settings(config)
        self._seed, self._counts = config.run.seed, self.config.clusters
        self.backbone, self.num_features = build_backbone(config.model)
        self.heads = nn.ModuleList(nn.Linear(self.num_features, count) for count in self._counts)
        self.labels = RowsById(len(self._counts), torch.int32)
        self.signs = {"cluster_picked": Sign(), "same_cluster": Sign()}
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._solve_steps: frozenset[int] = frozenset()

    def of_run(self, length: Length) -> None:
        """Labels are found again at steps that depend on the length of the run."""
        super().of_run(length)
        self._solve_steps = _solve_steps(self.config.solves, length)

    @classmethod
    def misfit(cls, config: Config, length: Length) -> str:
        """There may be fewer images than labels, or too many to find labels for."""
        settings, images = _settings(config), length.num_samples
        size = cls.phase_bytes(config, images)
        return clusters_found.misfit_of(settings.clusters, images, size, settings.max_phase_gb)

    @classmethod
    def phase_bytes(cls, config: Config, images: int) -> int:
        """Most bytes that a rank holds in a phase beside networks: features, labels, and what finds those of a head."""
        with torch.device("meta"):
            width = build_backbone(config.model)[1]
        counts, own = _settings(config).clusters, -(-images // world_size())
        of_image = width * bytes_per_number(config) + 2 * len(counts) * torch.int32.itemsize
        return own * of_image + (sum(counts) + max(counts)) * width * 8 + working_bytes(own, max(counts))

    def begin(self) -> None:
        """Labels at random, equally many of each."""
        images = self.length.num_samples
        self.labels.make_room(images, key="method.max_phase_gb", max_gb=math.inf)
        ids = np.arange(self.labels.first, self.labels.first + self.labels.num_own)
        for head, count in enumerate(self._counts):
            key = hash_coordinates(self._seed, head, _PURPOSE)
            self.labels.own[:, head] = torch.from_numpy(permute(ids, images, key) % count).to(self.labels.own)

    def phase_due(self, step: int) -> bool:
        """Whether labels are found again before a step."""
        return step in self._solve_steps

    def plain(self, images: Tensor) -> Tensor:
        """Features [B, F] of images, by BatchNorm's running statistics. The first time after an update also notes what
        heads are: ranks may hold weights in pieces, which are whole within `forward` alone.
        """
        with running_statistics_used(self.modules()):
            features: Tensor = self.backbone(images)
        if not self._layers:
            with torch.autocast(features.device.type, enabled=False):  # it would round weights
                self._layers = [self._layer(head) for head in self.heads]
        return features

    def _layer(self, head: nn.Module) -> tuple[Tensor, Tensor]:
        """Weights [K, F] and biases [K] of a head. Weights are scaled, so that biases take no digits from them."""
        own = next(head.parameters())
        basis = _SCALE * torch.eye(self.num_features, dtype=own.dtype, device=own.device)
        bias = head(torch.zeros_like(basis[:1])).double()
        weights = (head(basis).double() - bias).div_(_SCALE).T
        return weights.to(torch.promote_types(own.dtype, torch.float32)), bias[0]

    @torch.no_grad()
    def phase(self, step: int, corpus: PlainEmbeddings, beat: Callable[[str], None]) -> dict[str, float]:
        """Find labels.

        Collectives: those of `equal_clusters`, `beat`'s among them, and of `agreement`, once per head.
        """
        before, solved = self.labels.own.clone(), []
        for head, (weights, biases) in enumerate(self._layers):
            with clusters_found.blaming(self._counts, step):
                found = equal_clusters(
                    corpus.vectors,
                    weights,
                    biases,
                    power=self.config.power,
                    tolerance=self.config.tolerance,
                    iterations=self.config.solve_iterations,
                    beat=beat,
                )
            if found.error >= self.config.tolerance:
                _log.warning(
                    "labels of head %d, before step %d: error %.3g after %d iterations is above method.tolerance=%g; "
                    "raise method.solve_iterations",
                    head,
                    step,
                    found.error,
                    found.iterations,
                    self.config.tolerance,
                )
            self.labels.own[corpus.readable, head] = found.labels.to(torch.int32)
            solved.append(found)
        return clusters_found.found(before, self.labels.own, [one.sizes for one in solved], beat) | {
            "solve_iterations": sum(one.iterations for one in solved) / len(solved),
            "solve_error": max(one.error for one in solved),
        }

    def after_update(self, step: int) -> None:
        """Heads are not what they were."""
        self._layers = []

    def embed(self, views: Views) -> Named:
        """`logits.HEAD` of all views, [V, B, K]."""
        features = torch.cat([self.backbone(group) for group in views.images])
        return {
            f"logits.{number}": head(features).unflatten(0, (-1, len(views.ids)))
            for number, head in enumerate(self.heads)
        }

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The loss of a batch, or of one of its micro-batches.

        Collectives: an all-gather of ids, an all-reduce of their labels.
        """
        labels = self.labels.read(gather_rows(ids))
        own = labels[rank() * len(ids) :][: len(ids)].long()
        losses, picked = [], []
        for head in range(len(self._counts)):
            logits = inputs[f"logits.{head}"].flatten(0, 1)
            with torch.autocast(logits.device.type, enabled=False):
                logits = logits if logits.dtype == torch.float64 else logits.float()
                wanted = own[:, head].repeat(len(logits) // len(ids))
                losses.append(cross_entropy(logits, wanted))
                picked.append((logits.detach().argmax(1) == wanted).to(logits.dtype).mean())
        signs = {
            "cluster_picked": torch.stack(picked).mean(),
            "same_cluster": clusters_found.same_cluster(labels, self._counts),
        }
        return Output(torch.stack(losses).mean(), signs, {})

    def state(self, mesh: DeviceMesh) -> dict[str, Tensor]:
        """Labels, sharded by id."""
        return {"labels": self.labels.tensor(mesh)}

    def measures(self, loss: float, signs: dict[str, Tensor], num_images: int) -> dict[str, float]:
        """Signs, and the loss over ln K."""
        over = {"loss_over_ln_k": loss / clusters_found.uniform_loss(self._counts)}
        return over | super().measures(loss, signs, num_images)

    @classmethod
    def brief(cls, row: Row) -> str:
        """The loss as a share of that of uniform predictions."""
        return clusters_found.brief(row)

    def exemplar_scores(self, features: Tensor) -> list[Tensor]:
        """Logits of the labels of each head."""
        return [head(features) for head in self.heads]

    @classmethod
    def suited(cls, config: Config, length: Length) -> dict[str, Choice]:
        """At most one label for every ten images, and not too many solves."""
        most = max(1, int(_PER_EPOCH * length.num_steps / length.steps_per_epoch))
        apart = max(1, math.isqrt(length.num_steps) - 1)
        why = f"at most {_PER_EPOCH} per epoch, and each before a step of its own"
        solves = Choice(min(_settings(config).solves, most, apart), why)
        return clusters_found.suited(_settings(config).clusters, length) | {"solves": solves}

    @classmethod
    def without_start(cls) -> dict[str, Any]:
        """One solve: a few steps would otherwise have one before nearly each of them."""
        return {"solves": 1}

    @classmethod
    def complaints(cls, config: Config, length: Length) -> list[str]:
        """Also whether solves are too many for the run."""
        solves, epochs = _settings(config).solves, length.num_steps / length.steps_per_epoch
        most, found = max(1, int(_PER_EPOCH * epochs)), len(_solve_steps(solves, length))
        if found == solves <= most:
            return super().complaints(config, length)
        why = f"only {found} come before steps of their own" if found < solves else "each embeds every image"
        many = (
            f"method.solves={solves}: {why}, in a run of {length.num_steps:,} steps or {epochs:.3g} epochs; set "
            f"method.solves={min(most, max(1, math.isqrt(length.num_steps) - 1))} or fewer, or train longer"
        )
        return [many, *super().complaints(config, length)]

    @classmethod
    def loss_references(cls, config: Config) -> dict[str, float]:
        """The loss of uniform predictions."""
        return {"ln K (uniform predictions)": clusters_found.uniform_loss(_settings(config).clusters)}

    @classmethod
    def symptoms(cls, config: Config) -> list[Symptom]:
        """That one label is that of most images, or that labels are not learnt."""
        clusters, remedy = _settings(config).clusters, f"Try, in another run.dir, optim.lr={config.optim.lr / 2:.2g}"
        return [clusters_found.one_for_most(remedy, clusters), clusters_found.not_learnt(config)]

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """Labels in steps and in phases."""
        return clusters_found.panels()


def _solve_steps(solves: int, length: Length) -> frozenset[int]:
    """Steps before which labels are found again."""
    steps = {length.num_steps * i**2 // (solves + 1) ** 2 for i in range(1, solves + 1)}
    return frozenset(steps - {0})


def _settings(config: Config) -> Settings:
    assert isinstance(config.method, Settings)
    return config.method
