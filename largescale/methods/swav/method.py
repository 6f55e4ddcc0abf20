"""SwAV: swapped prediction of cluster assignments between views (arXiv 2006.09882, section 3).

Each large view of an image is assigned to prototypes by Sinkhorn-Knopp; every other view of it, large or small, must
predict that assignment: `losses.swapped_prediction` of scores and codes, the mean over heads.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import normalize

from largescale.config import Config
from largescale.data.views import Views
from largescale.methods.embedding_method import EmbeddingMethod, Named
from largescale.methods.losses import swapped_prediction
from largescale.methods.method import Exemplars, Output, Panel, Role, Row, Sign
from largescale.methods.milestone import Milestone
from largescale.methods.prototypes import Prototypes
from largescale.methods.sinkhorn import sinkhorn
from largescale.methods.swav import observe
from largescale.methods.swav.settings import Settings
from largescale.models.backbones import build_backbone
from largescale.models.heads import projection_head
from largescale.processes import world_size


class SwAV(EmbeddingMethod):
    """Backbone, projection head, prototypes and queue, and the loss over the views of a batch.

    Signs: `assignment_entropy`, the mean entropy of a sample's code over ln K; `used.HEAD`, which prototypes of a head
    are nearest to an assign view. Evidence: `scores.HEAD`, the scores of all views [V, B, K].
    """

    title = "SwAV"
    head_name = "projection"
    Settings = Settings
    queue: Tensor
    exemplars: ClassVar[Exemplars] = Exemplars("prototype", "What prototypes stand for")

    def __init__(self, config: Config) -> None:
        super().__init__()
        settings = self.config = _settings(config)
        self.groups = config.data.crops
        self.num_assign = self.groups[0].num
        self.backbone, self.num_features = build_backbone(config.model)
        self.projection = projection_head(
            self.num_features, settings.hidden, settings.embedding, batchnorm=settings.head_batchnorm
        )
        self.counts = settings.counts
        self.prototypes = Prototypes(settings.embedding, self.counts)
        self.signs = {
            "assignment_entropy": Sign(),
            **{f"used.{head}": Sign("any", (count,)) for head, count in enumerate(self.counts)},
        }
        # Queue: embeddings of the assign views of the last Q / B (micro-)batches, newest first: [A, Q / B, B_local, D].
        self.queue_steps = settings.queue // config.train.global_batch
        micro_batch = config.train.global_batch // config.train.accumulate
        shape = (self.num_assign, settings.queue // micro_batch, micro_batch // world_size(), settings.embedding)
        self.register_buffer("queue", torch.zeros(shape), persistent=False)

    def embed(self, views: Views) -> Named:
        """`scores.HEAD` of all views [V, B, K], and `embeddings` of the assign views [A, B, D] for the queue."""
        embeddings = self.project(torch.cat([self.backbone(group) for group in views.images]))
        with torch.autocast(embeddings.device.type, enabled=False):
            scores = self._by_view(self.prototypes(embeddings))
        own = self._by_view([embeddings])[0][: self.num_assign].detach()
        return {"embeddings": own, **{f"scores.{head}": values for head, values in enumerate(scores)}}

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The loss of one batch (with `train.accumulate`: of one of its micro-batches, unless the loss spans all); the
        queue takes part by step.

        Collectives: those of `sinkhorn`, once for all assign views and all heads with equally many prototypes.
        """
        scores = [inputs[f"scores.{head}"] for head in range(len(self.counts))]
        with torch.autocast(scores[0].device.type, enabled=False):
            codes = self._codes(scores, inputs["embeddings"].detach(), step)
            losses = [swapped_prediction(z, q, self.config.temperature) for z, q in zip(scores, codes, strict=True)]
            loss = torch.stack(losses).mean()
            evidence = {f"scores.{head}": values.detach() for head, values in enumerate(scores)}
            return Output(loss, self._signs(scores, codes), evidence)

    def project(self, features: Tensor) -> Tensor:
        """Backbone features [N, F] to unit embeddings [N, D] in float32 (float64 for a float64 model)."""
        embeddings = self.projection(features)
        return normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float(), dim=1)

    def measures(self, loss: float, signs: dict[str, Tensor], num_images: int) -> dict[str, float]:
        """Loss over ln K, entropy, and the share of prototypes in use, beside the share that could be."""
        used = torch.cat([signs[f"used.{head}"] for head in range(len(self.counts))]) > 0
        return {
            "loss_over_ln_k": loss / observe.uniform_loss(self.counts),
            "assignment_entropy": float(signs["assignment_entropy"]),
            "prototype_usage": float(used.double().mean()),
            "prototype_usage_reachable": observe.reachable_usage(self.counts, num_images),
        }

    def exemplar_scores(self, features: Tensor) -> Tensor:
        """Cosines with the prototypes of the first head."""
        return self.prototypes(self.project(features))[0]

    @classmethod
    def brief(cls, row: Row) -> str:
        """The loss as a share of that of uniform predictions."""
        return f" ({row['loss_over_ln_k']:.0%} of ln K)"

    @classmethod
    def diagnose(cls, config: Config, before: Row, row: Row) -> str:
        """A warning in words if this looks like collapse."""
        return observe.diagnose(config, _settings(config), before, row)

    @classmethod
    def loss_references(cls, config: Config) -> dict[str, float]:
        """The loss of uniform predictions."""
        return {"ln K (uniform predictions)": observe.uniform_loss(_settings(config).counts)}

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """Entropy of the codes and use of the prototypes."""
        return [
            Panel(
                "Assignments",
                {
                    "entropy of a code / ln K": "assignment_entropy",
                    "share of prototypes in use": "prototype_usage",
                    "share that this many images could reach": "prototype_usage_reachable",
                },
                limits=(0, 1.05),
            )
        ]

    @classmethod
    def milestones(cls, config: Config) -> list[Milestone]:
        """When prototypes begin to train and the queue, where there is one, to take part."""
        settings = _settings(config)
        queue_steps = settings.queue // config.train.global_batch
        prototypes = Milestone("method.freeze_prototypes_steps", settings.freeze_prototypes_steps, "prototypes train")
        queue = Milestone(
            "method.queue_start_step",
            settings.queue_start_step + queue_steps,
            "the queue takes part",
            delay=queue_steps,
            without="method.queue=0",
        )
        return [prototypes, queue] if queue_steps else [prototypes]

    def roles(self) -> list[Role]:
        """Prototypes keep unit length, stay in float32, since cosines feed Sinkhorn, and may begin to train later."""
        return [
            Role(
                "prototypes",
                "prototypes.*",
                frozen_until=self.config.freeze_prototypes_steps,
                unit_rows=True,
                float32=True,
            )
        ]

    def queue_is_full(self, step: int) -> bool:
        """Whether the queue takes part in the assignment of a step; it does so once it has been filled."""
        return self.queue_steps > 0 and step >= self.config.queue_start_step + self.queue_steps

    def state(self, mesh: DeviceMesh) -> dict[str, Tensor]:
        """The queue, sharded by places of the batch."""
        if self.queue_steps == 0:
            return {}
        return {"queue": DTensor.from_local(self.queue, mesh, [Shard(2)], run_check=False)}

    def _by_view(self, per_head: list[Tensor]) -> list[Tensor]:
        """[V * B, X] to [V, B, X]."""
        num_views = sum(group.num for group in self.groups)
        return [values.view(num_views, -1, values.shape[-1]) for values in per_head]

    @torch.no_grad()
    def _codes(self, scores: list[Tensor], embeddings: Tensor, step: int) -> list[Tensor]:
        """Codes [A, B, K] of the assign views for each head; heads of equal K share one Sinkhorn call."""
        num_assign, local_batch = self.num_assign, scores[0].shape[1]
        assign = [head[:num_assign].detach() for head in scores]
        if self.queue_is_full(step):
            queued = self.prototypes(self.queue.flatten(1, 2).flatten(0, 1).to(embeddings.dtype))
            assign = [
                torch.cat([fresh, old.view(num_assign, -1, old.shape[-1])], dim=1)
                for fresh, old in zip(assign, queued, strict=True)
            ]
        self._enqueue(embeddings, step)
        heads_by_count = defaultdict(list)
        for head, values in enumerate(assign):
            heads_by_count[values.shape[-1]].append(head)
        codes: dict[int, Tensor] = {}
        for heads in heads_by_count.values():
            packed = sinkhorn(
                torch.cat([assign[head] for head in heads]),
                epsilon=self.config.epsilon,
                iterations=self.config.sinkhorn_iterations,
                check_range=False,  # cosines by construction, so no look at the device is needed
            )
            codes.update(zip(heads, packed[:, :local_batch].split(num_assign), strict=True))
        return [codes[head] for head in range(len(assign))]

    def _enqueue(self, embeddings: Tensor, step: int) -> None:
        if self.queue_steps and step >= self.config.queue_start_step:
            # One micro-batch, or all of a step: [A, micro-batches, B, D], of which the last becomes the newest.
            fresh = embeddings.unflatten(1, (-1, self.queue.shape[2])).flip(1).to(self.queue.dtype)
            self.queue = torch.cat([fresh, self.queue[:, : -fresh.shape[1]]], dim=1)

    @torch.no_grad()
    def _signs(self, scores: list[Tensor], codes: list[Tensor]) -> dict[str, Tensor]:
        entropies = [torch.special.entr(q).sum(-1).mean() / math.log(q.shape[-1]) for q in codes]
        signs = {"assignment_entropy": torch.stack(entropies).mean()}
        for number, head in enumerate(scores):
            nearest = head[: self.num_assign].argmax(-1).flatten()
            # `used[nearest] = True` would copy the value to the device, and make the host wait for it.
            used = torch.zeros(head.shape[-1], dtype=torch.bool, device=head.device).index_fill_(0, nearest, True)
            signs[f"used.{number}"] = used
        return signs


def _settings(config: Config) -> Settings:
    assert isinstance(config.method, Settings)
    return config.method
