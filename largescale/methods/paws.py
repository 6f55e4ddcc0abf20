"""PAWS: views of an image, classified by their soft nearest neighbours among a few labelled images, have to agree
(arXiv 2104.13963).

Loss for unit predictions p of all views v, unit embeddings z of the large views a, and the same of supports, whose
classes are Y: smoothed labels [S, K]. With `near` as in `soft_neighbours`, the naive loop::

    for a in large views:
        t[a] = sharpened(near(z[a], z of supports, Y))          # no gradient
    for v in all views:
        q[v] = near(p[v], p of supports, Y)
        target = mean(t[a] for a in large views except v)
        loss += -(target * log(q[v])).sum(-1).mean() / num views
    mean = sharpened(q).mean()                                  # over all views, and images of all ranks
    loss -= mean_entropy * -(mean * log(mean)).sum()

Supports are images of all ranks: whoever holds one gets the gradient of what it did to all. Their number is that of
`method.support`, whatever the number of ranks. K counts the classes of a step. The last term keeps all images from
ending in few classes; with it the loss goes from 0, where every prediction is uniform, to -ln K.

Unlabelled images may be of none of the classes. With `in_domain`, RoPAWS (arXiv 2302.14483), t is made by
`in_domain_neighbours` of the batch of all ranks, and an image's part of the first sum is weighted by how likely it is
of one of the classes.

Departures: the published code sets targets below 1e-4 to 0, after which they do not sum up to 1. Without
`head_per_size`, heads see views of all sizes and supports together, and crop groups of one size go through the backbone
each by itself, supports with the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from largescale.config import Config, MethodConfig, SupportConfig
from largescale.config.setting import setting
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.methods.choice import Choice
from largescale.methods.embedding_method import SPANS, Named
from largescale.methods.joint_embedding import JointEmbedding, unit
from largescale.methods.losses.over_ranks import all_ranks, gathered, own_places
from largescale.methods.losses.soft_neighbours import (
    cross_entropies,
    crossing_targets,
    entropy_of,
    in_domain_neighbours,
    sharpened,
    smoothed_classes,
    soft_neighbours,
)
from largescale.methods.method import Output, Panel, Row, Sign, Symptom
from largescale.methods.multi_crop import by_size, num_large, require_two_large
from largescale.models.backbones import build_backbone
from largescale.models.heads import hidden_widths, mlp
from shards.ground.errors import InputError

_FEW_CLASSES = 0.5
"""Entropy of the mean prediction over ln K, below which most classes are hardly used."""

_MOST_CLASSES = 0.9
"""Share of the possible classes that a step of a proposed recipe has at least."""

_ROBUST = "method.in_domain"


@dataclass
class Settings(MethodConfig):
    """PAWS's keys under `method`."""

    loss_spans: ClassVar[tuple[str, ...]] = SPANS

    support: SupportConfig = field(default_factory=SupportConfig)
    hidden: list[int] = hidden_widths([2048, 2048])
    embedding: int = setting(2048, "Dimension of the embeddings.", at_least=1, at_most=2**24)
    predictor_hidden: list[int] = hidden_widths([512], "the predictor; [] has none")
    predictor_batchnorm: bool = setting(
        True, "BatchNorm in front of the predictor, if there is one, as in the published code.", before=False
    )
    head_per_size: bool = setting(
        True,
        "Pass views of each size through backbone and heads by themselves, supports with the largest, as the published "
        "code does, so that BatchNorm sees crops of one size at a time; else the heads see all at once.",
        before=False,
    )
    temperature: float = setting(0.1, "Divides cosines with supports.", at_least=1e-6, at_most=1e6)
    sharpening: float = setting(
        0.25,
        "Targets are predictions to the power of 1 over this; 1 leaves them as they are.",
        at_least=1e-3,
        at_most=1,
    )
    smoothing: float = setting(
        0.1, "Share of each label that is spread evenly over the classes of the step.", at_least=0, below=1
    )
    mean_entropy: float = setting(
        1.0,
        "Weight of the entropy of the mean prediction, which is made large; without it most images may end in few "
        "classes.",
        at_least=0,
        at_most=1e6,
    )

    in_domain: bool = setting(
        False,
        "Whether images that are like no support count less (RoPAWS): targets are votes of the batch's other images "
        "too, and an image's loss is weighted by how likely it is of one of the classes.",
    )
    label_ratio: float = setting(
        5.0, "Weight of all supports in these votes over that of all images.", above=0, at_most=1e6, used_if=_ROBUST
    )
    prior_temperature: float = setting(
        3.0,
        "An image is of one of the classes with probability exp((largest cosine with a support - 1) / this).",
        at_least=1e-6,
        at_most=1e6,
        used_if=_ROBUST,
    )
    prior_power: float = setting(
        1.0, "Its loss is weighted by that probability to this power.", at_least=0, at_most=100, used_if=_ROBUST
    )

    def check(self, config: Config) -> None:
        """There are large views to predict each other."""
        require_two_large(config)

    def supports(self) -> SupportConfig:
        """Labelled images in every step."""
        return self.support


class PAWS(JointEmbedding):
    """Backbone, projection and, if there is one, predictor, and the loss of a batch. Nothing goes on from step to step.

    Signs, beside those of embeddings: `support_accuracy`, the share of this rank's supports that the others of all
    ranks classify right; `target_entropy` and `class_balance`, the entropies of a target and of the mean prediction
    over ln K; `disagreement`, the loss without the entropy; `in_domain`, if it is asked for, its mean. Evidence:
    `probabilities` [V, B, K], `targets` [V, B, K].
    """

    title = "PAWS"
    reference = "paws/resnet50_100ep"
    head_name = "projection"
    Settings = Settings

    def __init__(self, config: Config) -> None:
        super().__init__()
        settings = self.config = _settings(config)
        self.num_large, self.num_classes = num_large(config.data.crops), settings.support.classes
        self.backbone, self.num_features = build_backbone(config.model)
        width = settings.embedding
        self.projection = mlp([self.num_features, *settings.hidden, width], bias=False, last_bias=True)
        self.predictor = _predictor(settings)
        watched: tuple[str, ...] = ("support_accuracy", "target_entropy", "class_balance", "disagreement")
        watched += ("in_domain",) if settings.in_domain else ()
        self.signs = self.embedding_signs(width) | {name: Sign() for name in watched}

    def embed(self, views: Views) -> Named:
        """`predictions` of all views [V, B, D] and of `supports` [N, S, D]; `embeddings` of the large views [A, B, D]
        and of supports, `support_embeddings` [N, S, D]. Supports go through the network with the large views.
        """
        assert views.supports is not None
        batch, size = len(views.ids), len(views.supports.ids)
        first, *others = views.images
        groups = [torch.cat([views.supports.images, first]), *others]
        if self.config.head_per_size:
            embedded = [self.projection(self.backbone(images)) for images in by_size(groups)]
        else:
            embedded = [self.projection(torch.cat([self.backbone(images) for images in groups]))]
        z, predicted = torch.cat(embedded), torch.cat([self.predictor(part) for part in embedded])
        num_supports = len(views.supports.images)
        supports, images = (part.split([num_supports, len(z) - num_supports]) for part in (z, predicted))
        return {
            "predictions": images[1].unflatten(0, (-1, batch)),
            "supports": images[0].unflatten(0, (-1, size)),
            "embeddings": supports[1].unflatten(0, (-1, batch))[: self.num_large],
            "support_embeddings": supports[0].unflatten(0, (-1, size)),
        }

    def targets(self, views: Views) -> Named:
        """`labels` and `support_ids` of supports, int64 [1, S]."""
        assert views.supports is not None
        return {"labels": views.supports.labels[None], "support_ids": views.supports.ids[None]}

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The loss of a batch, or of one of its micro-batches.

        Collectives: those of `gather_rows`: with gradient for predictions of supports and, a row per rank, for the
        mean prediction; without for their embeddings, labels and ids, and those of `_said_of`.
        """
        with torch.autocast(ids.device.type, enabled=False):
            return self._loss(inputs)

    def _loss(self, inputs: Named) -> Output:
        group, settings = all_ranks(), self.config
        predictions, embeddings = unit(inputs["predictions"]), unit(inputs["embeddings"].detach())
        own_embeddings, own_labels = unit(inputs["support_embeddings"].detach()), inputs["labels"][0]
        supports = gathered(unit(inputs["supports"]).transpose(0, 1), group)  # [S, N, D]
        known = gathered(own_embeddings.transpose(0, 1), group)
        labels = gathered(own_labels, group)
        classes = smoothed_classes(labels, self.num_classes, settings.smoothing, predictions.dtype)
        every = classes.repeat_interleave(supports.shape[1], 0)

        probabilities = soft_neighbours(predictions, supports.flatten(0, 1), every, temperature=settings.temperature)
        with torch.no_grad():
            said, in_domain = self._said_of(embeddings, known.flatten(0, 1), every)
            sharp = sharpened(said, settings.sharpening)
            targets = crossing_targets(sharp, len(predictions))
            right = self._support_accuracy(own_embeddings[0], own_labels, inputs, known[:, 0], labels)
        disagreement = (in_domain**settings.prior_power * cross_entropies(targets, probabilities)).mean()
        mean = gathered(sharpened(probabilities, settings.sharpening).mean((0, 1))[None], group).mean(0)
        entropy = entropy_of(mean)
        signs = self.watch_embeddings(embeddings[0], embeddings[1]) | {
            "support_accuracy": right,
            "target_entropy": entropy_of(sharp).mean() / math.log(self.num_classes),
            "class_balance": entropy.detach() / math.log(self.num_classes),
            "disagreement": disagreement.detach(),
            **({"in_domain": in_domain.mean()} if settings.in_domain else {}),
        }
        evidence = {"probabilities": probabilities.detach(), "targets": targets}
        return Output(disagreement - settings.mean_entropy * entropy, signs, evidence)

    def _said_of(self, embeddings: Tensor, known: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Class probabilities of the large views [A, B, K], and how likely each image is of one of the classes [B].

        Collectives: with `in_domain`, an all-gather of embeddings; every rank solves for the images of all.
        """
        settings = self.config
        if not settings.in_domain:
            said = soft_neighbours(embeddings, known, classes, temperature=settings.temperature)
            return said, embeddings.new_ones(embeddings.shape[1])
        group = all_ranks()
        own = own_places(embeddings.shape[1], group, embeddings.device)
        found = [
            in_domain_neighbours(
                of_view,
                known,
                classes,
                temperature=settings.temperature,
                label_ratio=settings.label_ratio,
                prior_temperature=settings.prior_temperature,
            )
            for of_view in gathered(embeddings.transpose(0, 1).contiguous(), group).unbind(1)
        ]
        said, in_domain = (torch.stack(parts)[:, own] for parts in zip(*found, strict=True))
        return said, in_domain.mean(0)

    def _support_accuracy(
        self, own: Tensor, labels: Tensor, inputs: Named, known: Tensor, known_labels: Tensor
    ) -> Tensor:
        """The share of own supports [S, D] that other images among those of all ranks classify right."""
        own_ids = inputs["support_ids"][0]
        similar = own @ known.T / self.config.temperature
        similar = similar.masked_fill(own_ids[:, None] == gathered(own_ids, all_ranks()), -math.inf)
        votes = similar.new_zeros(len(own), self.num_classes)
        votes.index_add_(1, known_labels, (similar - similar.amax(1, keepdim=True)).exp())
        return (votes.argmax(1) == labels).to(own.dtype).mean()

    def measures(self, loss: float, signs: dict[str, Tensor], num_images: int) -> dict[str, float]:
        """The signs, and how far the loss is above its least value."""
        above = loss + self.config.mean_entropy * math.log(self.num_classes)
        return {"loss_above_least": above, **super().measures(loss, signs, num_images)}

    @classmethod
    def suited(cls, config: Config, length: Length) -> dict[str, Choice]:
        """Supports of the classes that there are, of at least nine tenths of them in each step, unless these are more
        than twice the batch; in a number that 8 ranks, or as many as the batch tells of, can share.

        Raises:
            InputError: the images have no labels of two classes.
        """
        following, batch, accumulate = _settings(config).support, config.train.global_batch, config.train.accumulate
        found = following.classes if length.num_classes is None else length.num_classes
        if found < 2:
            raise InputError(
                f"method.name=paws: expected images with labels of at least two classes, and those looked at have "
                f"{found}; convert class folders, or choose a method without labels"
            )
        most = min(found, following.classes, max(2, 2 * batch // following.images))
        parts, images = math.lcm(8, batch // (batch & -batch)), -(-following.images // accumulate) * accumulate
        while True:  # ends: with `parts` images per micro-batch, any number of classes can be shared
            even = parts // math.gcd(parts, images // accumulate)
            if (classes := most // even * even) >= max(2, _MOST_CLASSES * most):
                break
            images += accumulate
        return {
            "support.classes": Choice(classes, f"in each step, of {found}" if classes < found else "all of them"),
            "support.images": Choice(images, f"of each class per step: {classes * images} beside {batch} images"),
        }

    @classmethod
    def brief(cls, row: Row) -> str:
        """How many supports the others classify right."""
        return f" (supports {row['support_accuracy']:.1%} right)" if "support_accuracy" in row else ""

    @classmethod
    def symptoms(cls, config: Config) -> list[Symptom]:
        """Those of embeddings, and predictions that use few of the classes."""
        collapsed, low_rank = super().symptoms(config)
        few = Symptom(
            "few classes are predicted",
            sign=lambda row: row.get("class_balance"),
            sick=(0, _FEW_CLASSES),
            recovery="up",
            seen=lambda row: f"most images are put into few classes (entropy {row['class_balance']:.0%} of ln K)",
            remedy=cls.remedy(config),
            in_settings=bool(cls.missing(config)),
            by_rate=True,
        )
        return [collapsed, few, low_rank]

    @classmethod
    def missing(cls, config: Config) -> str:
        """What keeps the method from collapse but is switched off."""
        if _settings(config).mean_entropy == 0:
            return "Nothing keeps images from ending in one class: set method.mean_entropy=1, in another run.dir"
        return ""

    @classmethod
    def loss_references(cls, config: Config) -> dict[str, float]:
        """The loss of uniform predictions, and the least."""
        settings = _settings(config)
        most = math.log(settings.support.classes)
        return {
            "uniform predictions": most * (1 - settings.mean_entropy),
            "sure, all classes alike": -most * settings.mean_entropy,
        }

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """What supports and predictions say of classes, before the panels of embeddings."""
        return [
            Panel(
                "Classes",
                {
                    "supports told right by the others": "support_accuracy",
                    "entropy of a target / ln K": "target_entropy",
                    "entropy of the mean prediction / ln K": "class_balance",
                },
                limits=(0, 1.05),
            ),
            *super().panels(config),
        ]


def _predictor(settings: Settings) -> nn.Module:
    """[B, D] to [B, D]; nothing if it has no hidden layer."""
    if not settings.predictor_hidden:
        return nn.Identity()
    width = settings.embedding
    layers = mlp([width, *settings.predictor_hidden, width], bias=False, last_bias=True)
    return nn.Sequential(nn.BatchNorm1d(width), *layers) if settings.predictor_batchnorm else layers


def _settings(config: Config) -> Settings:
    assert isinstance(config.method, Settings)
    return config.method
