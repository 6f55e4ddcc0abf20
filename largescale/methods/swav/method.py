"""SwAV: swapped prediction of cluster assignments between views (arXiv 2006.09882, section 3).

Each large view of an image is assigned to prototypes by Sinkhorn-Knopp; every other view of it, large or small, must
predict that assignment: `losses.swapped_prediction` of scores and codes, the mean over heads.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import normalize

from largescale.config import Config
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.methods.beside import Beside
from largescale.methods.choice import Choice
from largescale.methods.embedding_method import Named
from largescale.methods.joint_embedding import JointEmbedding
from largescale.methods.losses import swapped_prediction
from largescale.methods.method import Exemplars, Output, Panel, Role, Row, Sign, Symptom
from largescale.methods.milestone import Milestone
from largescale.methods.multi_crop import by_size, num_large
from largescale.methods.prototypes import Prototypes
from largescale.methods.sinkhorn import sinkhorn
from largescale.methods.state_size import bytes_per_number
from largescale.methods.swav import observe
from largescale.methods.swav.assignment import Assignment, hardened, prior
from largescale.methods.swav.settings import Settings
from largescale.methods.swav.suited import suited
from largescale.models.backbones import build_backbone
from largescale.models.heads import projection_head
from largescale.processes import collective_timeout, world_size


class SwAV(JointEmbedding):
    """Backbone, projection head, prototypes and queue, and the loss over the views of a batch.

    Signs, beside those of embeddings: `assignment_entropy`, the mean entropy of a sample's code over ln K; `used.HEAD`,
    which prototypes of a head are nearest to an assign view; `mean_code.HEAD`, the mean code of the batch [K].
    Evidence: `scores.HEAD`, the scores of all views [V, B, K].
    """

    title = "SwAV"
    reference, small_reference = "swav/own_images", "swav/own_images_cpu"
    head_name = "projection"
    Settings = Settings
    queue: Tensor
    exemplars: ClassVar[Exemplars] = Exemplars("prototype", "What prototypes stand for")

    def __init__(self, config: Config) -> None:
        super().__init__()
        settings = self.config = _settings(config)
        self.groups = config.data.crops
        self._overlaps, self._timeout = settings.overlaps(config), collective_timeout(config.run.hang_timeout_s)
        self._beside: Beside | None = None
        self.num_assign = num_large(config.data.crops)
        self.backbone, self.num_features = build_backbone(config.model)
        self.projection = projection_head(
            self.num_features, settings.hidden, settings.embedding, batchnorm=settings.head_batchnorm
        )
        self.counts = settings.counts
        self.prototypes = Prototypes(settings.embedding, self.counts)
        self.signs = {
            **self.embedding_signs(settings.embedding),
            "assignment_entropy": Sign(),
            **{f"used.{head}": Sign("any", (count,)) for head, count in enumerate(self.counts)},
            **{f"mean_code.{head}": Sign(shape=(count,)) for head, count in enumerate(self.counts)},
        }
        if self.num_assign == 1:
            del self.signs["agreement"], self.signs["agreement_of_others"]
        # Queue: embeddings of the assign views of the last Q / B (micro-)batches, newest first: [A, Q / B, B_local, D].
        self.queue_steps = settings.queue // config.train.global_batch
        micro_batch = config.train.global_batch // config.train.accumulate
        shape = (self.num_assign, settings.queue // micro_batch, micro_batch // world_size(), settings.embedding)
        self.register_buffer("queue", torch.zeros(shape), persistent=False)

    def begin(self) -> None:
        """Make room for codes beside the network, where they are computed there."""
        self._beside = Beside(self._timeout) if self._overlaps else None

    @classmethod
    def misfit(cls, config: Config, length: Length) -> str:
        """The queue may be too large."""
        settings, ranks = _settings(config), world_size()
        row = num_large(config.data.crops) * settings.embedding * bytes_per_number(config)
        size = settings.queue // ranks * row / 1e9
        if size <= settings.max_queue_gb:
            return ""
        batch = config.train.global_batch
        most = int(settings.max_queue_gb * 1e9 / row * ranks) // batch * batch
        return (
            f"method.queue={settings.queue}: expected at most {most:,}, since {size:.3g} GB on each of "
            f"{ranks} rank{'s' * (ranks > 1)} are more than method.max_queue_gb={settings.max_queue_gb:g}"
        )

    def embed(self, views: Views) -> Named:
        """`scores.HEAD` of all views [V, B, K], and `embeddings` of the assign views [A, B, D] for the queue."""
        return self._joined(list(self._parts(views)))

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The loss of one batch (with `train.accumulate`: of one of its micro-batches, unless the loss spans all); the
        queue takes part by step.

        Collectives: those of `sinkhorn`, once for all assign views and all heads with equally many prototypes.
        """
        return self._output(inputs, self._codes(self._to_assign(inputs, step), step=step), step)

    def loss_of_views(self, views: Views, targets: Named, step: int) -> Output:
        """The same; where it can be, codes are computed beside the network, which small crops are still in.

        Collectives: those of `loss`, in a group of their own.
        """
        if self._beside is None:
            return super().loss_of_views(views, targets, step)
        parts = self._parts(views)
        large = next(parts)
        codes = self._beside.start(partial(self._codes, step=step), self._to_assign(large, step))
        inputs = self._joined([large, *parts])
        del large  # its scores are in `inputs` now
        return self._output(inputs, codes(), step)

    def project(self, features: Tensor) -> Tensor:
        """Backbone features [N, F] to unit embeddings [N, D] in float32 (float64 for a float64 model)."""
        embeddings = self.projection(features)
        return normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float(), dim=1)

    def measures(self, loss: float, signs: dict[str, Tensor], num_images: int) -> dict[str, float]:
        """Loss over ln K, entropy of a code and of the mean code, and the share of prototypes in use, beside the share
        that could be; then the measures of embeddings.
        """
        used = torch.cat([signs[f"used.{head}"] for head in range(len(self.counts))]) > 0
        mean_codes = [signs[f"mean_code.{head}"] for head in range(len(self.counts))]
        entropy = float(signs["assignment_entropy"])
        return {
            "loss_over_ln_k": loss / observe.uniform_loss(self.counts),
            "assignment_entropy": entropy,
            "code_balance": observe.balance(mean_codes, entropy, num_images, self.config.prior_power),
            "prototype_usage": float(used.double().mean()),
            "prototype_usage_reachable": observe.reachable_usage(self.counts, num_images, self.config.prior_power),
            **super().measures(loss, {name: value for name, value in signs.items() if "." not in name}, num_images),
        }

    def exemplar_scores(self, features: Tensor) -> list[Tensor]:
        """Cosines with the prototypes of each head."""
        return list(self.prototypes(self.project(features)))

    @classmethod
    def brief(cls, row: Row) -> str:
        """The loss as a share of that of uniform predictions."""
        return f" ({row['loss_over_ln_k']:.0%} of ln K)"

    @classmethod
    def symptoms(cls, config: Config) -> list[Symptom]:
        """Those of codes and predictions, beside those of embeddings, which can bring them about."""
        collapsed, low_rank = super().symptoms(config)
        return [collapsed, *observe.symptoms(config, _settings(config), low_rank)]

    @classmethod
    def loss_references(cls, config: Config) -> dict[str, float]:
        """The loss of uniform predictions."""
        return {"ln K (uniform predictions)": observe.uniform_loss(_settings(config).counts)}

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """Entropy of the codes and use of the prototypes, before the panels of embeddings."""
        return [
            Panel(
                "Assignments",
                {
                    "entropy of a code / ln K": "assignment_entropy",
                    "entropy of the mean code / ln K": "code_balance",
                    "share of prototypes in use": "prototype_usage",
                    "share that this many images could reach": "prototype_usage_reachable",
                },
                limits=(0, 1.05),
            ),
            *super().panels(config),
        ]

    @classmethod
    def suited(cls, config: Config, length: Length) -> dict[str, Choice]:
        """Prototypes, their freeze and the queue."""
        return suited(config, length)

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

    def _parts(self, views: Views) -> Iterator[Named]:
        """`scores.HEAD` and `embeddings` of what the head sees at a time, the assign views first."""
        sizes = by_size(views.images)
        for groups in [[group] for group in sizes] if self.config.head_per_group else [sizes]:
            embeddings = self.project(torch.cat([self.backbone(group) for group in groups]))
            with torch.autocast(embeddings.device.type, enabled=False):
                scores = self.prototypes(embeddings)
            by_view = [values.view(-1, len(views.ids), values.shape[-1]) for values in (embeddings, *scores)]
            yield {"embeddings": by_view[0], **{f"scores.{head}": one for head, one in enumerate(by_view[1:])}}

    def _joined(self, parts: list[Named]) -> Named:
        """What `embed` returns."""
        scores = {name: [part[name] for part in parts] for name in parts[0] if name != "embeddings"}
        own = parts[0]["embeddings"][: self.num_assign].detach()
        # Scores may be large, so those of a single part are not copied.
        return {
            "embeddings": own,
            **{name: ones[0] if len(ones) == 1 else torch.cat(ones) for name, ones in scores.items()},
        }

    def _output(self, inputs: Named, codes: list[Tensor], step: int) -> Output:
        """The loss of scores whose codes are known."""
        temperature = self._assignment(step).temperature
        scores = [inputs[f"scores.{head}"] for head in range(len(self.counts))]
        with torch.autocast(scores[0].device.type, enabled=False):
            codes = [q[:, : head.shape[1]] for q, head in zip(codes, scores, strict=True)]
            losses = [swapped_prediction(z, q, temperature) for z, q in zip(scores, codes, strict=True)]
            evidence = {f"scores.{head}": values.detach() for head, values in enumerate(scores)}
            return Output(torch.stack(losses).mean(), self._signs(scores, codes, inputs["embeddings"]), evidence)

    @torch.no_grad()
    def _to_assign(self, inputs: Named, step: int) -> list[Tensor]:
        """For each head the scores to be assigned [A, B + Q, K]: those of the assign views, then of the queue where it
        takes part, which gets the embeddings afterwards.
        """
        embeddings = inputs["embeddings"][: self.num_assign].detach()
        assign = [inputs[f"scores.{head}"][: self.num_assign].detach() for head in range(len(self.counts))]
        with torch.autocast(embeddings.device.type, enabled=False):
            if self.queue_is_full(step):
                queued = self.prototypes(self.queue.flatten(1, 2).flatten(0, 1).to(embeddings.dtype))
                assign = [
                    torch.cat([fresh, old.view(self.num_assign, -1, old.shape[-1])], dim=1)
                    for fresh, old in zip(assign, queued, strict=True)
                ]
        self._enqueue(embeddings, step)
        return assign

    @torch.no_grad()
    def _codes(self, assign: list[Tensor], group: dist.ProcessGroup | None = None, *, step: int) -> list[Tensor]:
        """Codes [A, B + Q, K] for each head; heads of equal K share one Sinkhorn call."""
        now = self._assignment(step)
        heads_by_count = defaultdict(list)
        for head, values in enumerate(assign):
            heads_by_count[values.shape[-1]].append(head)
        codes: dict[int, Tensor] = {}
        for count, heads in heads_by_count.items():
            packed = sinkhorn(
                torch.cat([assign[head] for head in heads]),
                epsilon=now.epsilon,
                iterations=now.iterations,
                prior=prior(count, self.config.prior_power, assign[heads[0]].device),
                group=group,
                check_range=False,  # cosines by construction, so no look at the device is needed
                fused=self.config.fused_sinkhorn,
            )
            packed = hardened(packed) if now.hard else packed
            codes.update(zip(heads, packed.split(self.num_assign), strict=True))
        return [codes[head] for head in range(len(assign))]

    def _assignment(self, step: int) -> Assignment:
        return Assignment.at(step, self.length.num_steps, self.config)

    def _enqueue(self, embeddings: Tensor, step: int) -> None:
        if self.queue_steps and step >= self.config.queue_start_step:
            # One micro-batch, or all of a step: [A, micro-batches, B, D], of which the last becomes the newest.
            fresh = embeddings.unflatten(1, (-1, self.queue.shape[2])).flip(1).to(self.queue.dtype)
            self.queue = torch.cat([fresh, self.queue[:, : -fresh.shape[1]]], dim=1)

    @torch.no_grad()
    def _signs(self, scores: list[Tensor], codes: list[Tensor], embeddings: Tensor) -> dict[str, Tensor]:
        entropies = [torch.special.entr(q).sum(-1).mean() / math.log(q.shape[-1]) for q in codes]
        signs = self.watch_embeddings(embeddings[0], embeddings[self.num_assign - 1])
        if self.num_assign == 1:
            del signs["agreement"], signs["agreement_of_others"]
        signs["assignment_entropy"] = torch.stack(entropies).mean()
        for number, head in enumerate(scores):
            nearest = head[: self.num_assign].argmax(-1).flatten()
            # `used[nearest] = True` would copy the value to the device, and make the host wait for it.
            used = torch.zeros(head.shape[-1], dtype=torch.bool, device=head.device).index_fill_(0, nearest, True)
            signs[f"used.{number}"], signs[f"mean_code.{number}"] = used, codes[number].mean((0, 1))
        return signs


def _settings(config: Config) -> Settings:
    assert isinstance(config.method, Settings)
    return config.method
