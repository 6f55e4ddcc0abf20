"""SwAV: swapped prediction of cluster assignments between views (arXiv 2006.09882, section 3).

Each large view of an image is assigned to prototypes by Sinkhorn-Knopp; every other view of it, large or small, must
predict that assignment. Loss for scores z and codes q, the naive loop::

    for a in assign views:
        for v in all views except a:
            loss += -(q[a] * log_softmax(z[v] / temperature)).sum(-1).mean()
    loss /= num assign views * (num views - 1)                       # and the mean over heads
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import log_softmax, normalize

from largescale.config import Config, prototype_counts
from largescale.methods.milestone import Milestone
from largescale.methods.sinkhorn import sinkhorn
from largescale.models.backbones import build_backbone
from largescale.models.heads import Prototypes, projection_head
from largescale.processes import world_size


class MethodOutput(NamedTuple):
    """What a method returns for one step: the loss of the local batch and, detached, what to watch.

    A tuple, since FSDP2 looks for the tensors to hook in tuples but not in data classes.

    Attributes:
        loss: scalar, the mean over the local batch.
        assignment_entropy: scalar in [0, 1]: mean entropy of a sample's code, over ln K.
        nearest: for each head, the prototype nearest to each assign view, int64 [A * B].
        scores: for each head, the scores of all views [V, B, K].
    """

    loss: Tensor
    assignment_entropy: Tensor
    nearest: list[Tensor]
    scores: list[Tensor]


class SwAV(nn.Module):
    """Backbone, projection head, prototypes and queue, and the loss over the views of a batch."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config.method
        self.groups = config.data.crops
        self.num_assign = self.groups[0].num
        self.backbone, self.num_features = build_backbone(config.model)
        self.projection = projection_head(
            self.num_features, config.model.hidden, config.model.embedding, batchnorm=config.model.head_batchnorm
        )
        self.prototypes = Prototypes(config.model.embedding, prototype_counts(config))
        # Queue: embeddings of the assign views of the last Q / B (micro-)batches, newest first: [A, Q / B, B_local, D].
        self.queue_steps = config.method.queue // config.train.global_batch
        micro_batch = config.train.global_batch // config.train.accumulate
        shape = (self.num_assign, config.method.queue // micro_batch, micro_batch // world_size(),
                 config.model.embedding)
        self.register_buffer("queue", torch.zeros(shape), persistent=False)

    def forward(self, views: list[Tensor], step: int) -> MethodOutput:
        """The loss of one batch (with `train.accumulate`: of one of its micro-batches).

        Args:
            views: one tensor [num * B, 3, S, S] a crop group, view after view.
            step: the global step; decides whether the queue takes part.

        Collectives: those of `sinkhorn`, once for all assign views and all heads with equally many prototypes.
        """
        embeddings = self.embed(torch.cat([self.backbone(group) for group in views]))
        with torch.autocast(embeddings.device.type, enabled=False):
            scores = self._by_view(self.prototypes(embeddings))
            codes = self._codes(scores, self._by_view([embeddings])[0], step)
            loss = torch.stack([self._swapped_loss(z, q) for z, q in zip(scores, codes, strict=True)]).mean()
            return MethodOutput(loss, *self._observe(scores, codes), [head.detach() for head in scores])

    def embed(self, features: Tensor) -> Tensor:
        """Backbone features [N, F] to unit embeddings [N, D] in float32 (float64 for a float64 model)."""
        embeddings = self.projection(features)
        return normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float(), dim=1)

    @staticmethod
    def milestones(config: Config) -> list[Milestone]:
        """When prototypes begin to train and the queue, where there is one, to take part."""
        method, queue_steps = config.method, config.method.queue // config.train.global_batch
        prototypes = Milestone("method.freeze_prototypes_steps", method.freeze_prototypes_steps, "prototypes train")
        queue = Milestone("method.queue_start_step", method.queue_start_step + queue_steps, "the queue takes part",
                          delay=queue_steps, without="method.queue=0")
        return [prototypes, queue] if queue_steps else [prototypes]

    def prototypes_frozen(self, step: int) -> bool:
        """Whether the update of a step leaves the prototypes alone."""
        return step < self.config.freeze_prototypes_steps

    def after_update(self) -> None:
        """Normalise the prototypes. Collectives: none."""
        self.prototypes.normalize_()

    def queue_is_full(self, step: int) -> bool:
        """Whether the queue takes part in the assignment of a step; it does so once it has been filled."""
        return self.queue_steps > 0 and step >= self.config.queue_start_step + self.queue_steps

    def extra_state(self, mesh: DeviceMesh) -> dict[str, Tensor]:
        """State outside parameters and buffers, sharded by rank so that it loads into another number of ranks."""
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
        self._enqueue(embeddings[:num_assign].detach(), step)
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
            self.queue = torch.cat([embeddings[:, None].to(self.queue.dtype), self.queue[:, :-1]], dim=1)

    def _swapped_loss(self, scores: Tensor, codes: Tensor) -> Tensor:
        """Loss of one head: scores [V, B, K], codes [A, B, K]."""
        log_p = log_softmax(scores / self.config.temperature, dim=-1)
        # The other views of assign view a are all views less itself.
        others = log_p.sum(0) - log_p[: self.num_assign]
        num_pairs = self.num_assign * (scores.shape[0] - 1) * scores.shape[1]
        return -(codes * others).sum() / num_pairs

    @torch.no_grad()
    def _observe(self, scores: list[Tensor], codes: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        entropies = [-(q * q.clamp_min(1e-30).log()).sum(-1).mean() / math.log(q.shape[-1]) for q in codes]
        nearest = [head[: self.num_assign].argmax(-1).flatten() for head in scores]
        return torch.stack(entropies).mean(), nearest
