"""Distillation: a student learns to answer as a teacher does, on images without labels (SimCLRv2, arXiv 2006.10029).

The naive loop::

    for i in images:
        for view in views of i:                                  # teacher and student see the same view
            p = softmax(teacher(view) / T)                       # frozen, in evaluation mode
            loss -= (1 - w) * T**2 * sum(p * log softmax(head(backbone(view)) / T)) / B / V
    for i in labelled images, if w > 0:
        loss -= w * log softmax(head(backbone(view of i)))[label of i] / S

The teacher is a classifier that few labels made, say `largescale finetune`; the student may be smaller, or equal
(self-distillation). `largescale distill TEACHER CONFIG` puts the teacher's file, its SHA-256 and the names of its
classes into the configuration, which is kept with every checkpoint: a run goes on with no other teacher.

With w = 0 this is the paper's equation 2, on images without labels alone; with w > 0 its equation 3. Labelled images
then join every step (`method.support`), all classes in each; they may be those that the teacher was made with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from largescale.config import Config, SupportConfig, corpus_settings
from largescale.config.schema import MethodConfig
from largescale.config.setting import setting
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.methods.embedding_method import EmbeddingMethod, Named
from largescale.methods.float32 import at_least_float32
from largescale.methods.losses.soft_targets import soft_targets
from largescale.methods.method import Output, Panel, Row, Sign, Symptom
from largescale.models.backbones import build_backbone
from largescale.models.heads import hidden_widths, mlp
from largescale.models.image_classifier import ImageClassifier, checksum, read_classifier
from shards.format.manifest import read_manifest
from shards.ground.errors import InputError

_COMMAND = "use `largescale distill TEACHER CONFIG`, which sets it"
_NOTHING_LEARNT = 0.98
_SAYS_NOTHING = 0.98
_HALF = (torch.bfloat16, torch.float16)


@dataclass
class Settings(MethodConfig):
    """Distillation's keys under `method`."""

    teacher: str = setting(
        "", "File of the classifier to learn from, as `largescale finetune` writes it; may be moved.", free=True
    )
    teacher_sha256: str = setting("", "SHA-256 of the teacher's file; another file is refused.")
    classes: list[str] = setting([], "Names of the teacher's classes, in the order of its scores.")
    temperature: float = setting(
        1.0, "Temperature of both; smaller is sharper, towards the teacher's first choice.", above=0, at_most=1e3
    )
    hidden: list[int] = hidden_widths((), of="the student's head, with BatchNorm and ReLU, below its classifier")
    label_weight: float = setting(
        0.0,
        "Weight of the loss on labelled images, beside which the teacher's has the rest; 0 uses no labels.",
        at_least=0,
        at_most=1,
    )
    support: SupportConfig = field(default_factory=SupportConfig)

    def check(self, config: Config) -> None:
        """Every step has labelled images of every class, if it has any."""
        if self.label_weight > 0 and self.classes and self.support.classes != len(self.classes):
            raise InputError(
                f"method.support.classes={self.support.classes}: expected {len(self.classes)}, all of method.classes"
            )

    def supports(self) -> SupportConfig | None:
        """Labelled images, if they have a weight."""
        return self.support if self.label_weight > 0 else None

    def uses_labels(self) -> bool:
        """The teacher tells classes that it learnt from labels."""
        return True


class Distillation(EmbeddingMethod):
    """Backbone, head, and the loss between its answers and the teacher's. Evidence: `logits` and `wanted` [V, B, K];
    with labels also `support_logits` [N, S, K] and `labels` [1, S].

    The teacher is whole on every rank, in no checkpoint, and there only where the student is trained.
    """

    title = "Distillation"
    reference = "distillation/resnet50_400ep"
    head_name = "head"
    Settings = Settings

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._settings = _settings(config)
        self._normalisation = config.data.mean, config.data.std
        self.class_names = self._settings.classes
        if len(self.class_names) < 2:
            raise InputError(f"method.classes={self.class_names}: expected those of the teacher; {_COMMAND}")
        self.backbone, self.num_features = build_backbone(config.model)
        widths = [self.num_features, *self._settings.hidden, len(self.class_names)]
        self.head = mlp(widths, bias=False, last_bias=True)
        self.signs = {"same_choice": Sign(), "teacher_entropy": Sign(), "divergence": Sign()}
        if self._settings.label_weight > 0:
            self.signs["label_accuracy"] = Sign()

    @classmethod
    def misfit(cls, config: Config, length: Length) -> str:
        """Whether the teacher's file is there and the one that the configuration names."""
        ours = _settings(config)
        try:
            if not ours.teacher:
                return ""  # a recipe by itself; `begin` refuses to train it
            found = read_classifier(ours.teacher)
            _require(ours, found.classes)
            _require_labels(ours, config)
        except InputError as error:
            return str(error)
        return ""

    @classmethod
    def complaints(cls, config: Config, length: Length) -> list[str]:
        """Also labelled images that are named and not used."""
        settings, found = _settings(config), super().complaints(config, length)
        if settings.label_weight == 0 and settings.support != SupportConfig():
            found.append(
                "method.support has no effect without method.label_weight: no label is used; set "
                "method.label_weight=0.5, or leave method.support out"
            )
        return found

    def begin(self) -> None:
        """Read the teacher, and put it beside the student."""
        ours, own = self._settings, next(self.backbone.parameters())
        if not ours.teacher:
            raise InputError(f"method.teacher is not set: there is nothing to learn from; {_COMMAND}")
        found = read_classifier(ours.teacher)
        network = found.load(own.device, own.dtype)
        self.held = [_Teacher(network, (found.mean, found.std), self._normalisation).eval()]

    def classify(self, images: Tensor) -> Tensor:
        """Scores [B, K] of `class_names`."""
        return self.head(self.encode(images))

    def embed(self, views: Views) -> Named:
        """`logits` of all views, [V, B, K]; `support_logits` of labelled images, [N, S, K], which go through the
        network with the first crop group.
        """
        first, *others = views.images
        labelled = views.supports
        num_views = len(first)
        if labelled is not None:
            first = torch.cat([first, labelled.images])
        found = self.head(self.backbone(first))
        logits = torch.cat([found[:num_views], *(self.head(self.backbone(group)) for group in others)])
        own = {"logits": logits.unflatten(0, (-1, len(views.ids)))}
        if labelled is None:
            return own
        return own | {"support_logits": found[num_views:].unflatten(0, (-1, len(labelled.ids)))}

    def targets(self, views: Views) -> Named:
        """`wanted`: what the teacher says of all views, [V, B, K]; `labels` of the labelled images, int64 [1, S]."""
        [teacher] = self.held
        logits = torch.cat([teacher(group) for group in views.images])
        labels = {} if views.supports is None else {"labels": views.supports.labels[None]}
        return {"wanted": logits.unflatten(0, (-1, len(views.ids))), **labels}

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The loss of the docstring. Collectives: none."""
        logits, wanted = inputs["logits"].flatten(0, 1), inputs["wanted"].flatten(0, 1)
        found = soft_targets(logits, wanted, self._settings.temperature)
        agree = (logits.detach().argmax(1) == wanted.argmax(1)).to(found.entropy.dtype).mean()
        signs = {"same_choice": agree, "teacher_entropy": found.entropy, "divergence": found.divergence}
        loss = found.loss
        if "labels" in inputs:
            labelled, accuracy = _of_labels(inputs["support_logits"], inputs["labels"])
            weight = self._settings.label_weight
            loss, signs["label_accuracy"] = (1 - weight) * loss + weight * labelled, accuracy
        return Output(loss, signs, {name: value.detach() for name, value in inputs.items()})

    def measures(self, loss: float, signs: dict[str, Tensor], num_images: int) -> dict[str, float]:
        """Also the divergence over that of uniform answers, and the teacher's entropy over ln K."""
        most, entropy = math.log(len(self.class_names)), float(signs["teacher_entropy"])
        own = {"teacher_entropy_over_ln_k": entropy / most}
        if most - entropy > 1e-6:
            own["divergence_over_uniform"] = float(signs["divergence"]) / (most - entropy)
        return own | super().measures(loss, signs, num_images)

    @classmethod
    def brief(cls, row: Row) -> str:
        """How often the student's first choice is the teacher's."""
        return f" ({row['same_choice']:.1%} as the teacher)" if "same_choice" in row else ""

    @classmethod
    def symptoms(cls, config: Config) -> list[Symptom]:
        """A teacher that says nothing, and a student that learns nothing of it."""
        temperature = _settings(config).temperature
        return [
            Symptom(
                "teacher says nothing",
                sign=lambda row: row.get("teacher_entropy_over_ln_k"),
                sick=(_SAYS_NOTHING, math.inf),
                recovery="down",
                seen=lambda row: f"the teacher is undecided (entropy {row['teacher_entropy_over_ln_k']:.0%} of ln K)",
                remedy=f"Try, in another run.dir, method.temperature={temperature / 4:.2g}, and look at the accuracy "
                "that its file states",
                meaning="its answers hardly differ from image to image",
                in_settings=True,
            ),
            Symptom(
                "student does not follow",
                sign=lambda row: row.get("divergence_over_uniform"),
                sick=(_NOTHING_LEARNT, math.inf),
                recovery="down",
                seen=lambda row: (
                    "answers are no nearer to the teacher's than uniform ones (divergence "
                    f"{row['divergence_over_uniform']:.0%} of theirs)"
                ),
                remedy=f"Try, in another run.dir, optim.lr={config.optim.lr / 3:.2g} or {3 * config.optim.lr:.2g}, or "
                "a longer run",
                meaning="the student learns nothing of what the teacher says",
                by_rate=True,
            ),
        ]

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """How often both choose alike, and how far their answers are apart."""
        return [
            Panel("Same first choice as the teacher", {"share of views": "same_choice"}, limits=(0, 1.05)),
            Panel("Distance to the teacher", {"divergence": "divergence", "teacher's entropy": "teacher_entropy"}),
        ]


def _of_labels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of logits [N, S, K] with labels [1, S], and the share of them that is right."""
    labels = labels.expand(len(logits), -1).flatten()
    with torch.autocast(logits.device.type, enabled=False):
        logits = at_least_float32(logits.flatten(0, 1))
        return cross_entropy(logits, labels), (logits.detach().argmax(1) == labels).to(logits.dtype).mean()


class _Teacher(nn.Module):
    """A frozen classifier that sees images normalised as the student's are.

    Args:
        network: in evaluation mode.
        its, ours: mean and standard deviation that images are normalised with for the teacher and for the student.
    """

    def __init__(
        self, network: ImageClassifier, its: tuple[list[float], list[float]], ours: tuple[list[float], list[float]]
    ) -> None:
        super().__init__()
        self.network, self._is_alike = network, its == ours
        a_weight = next(network.parameters())
        scale = [own / theirs for own, theirs in zip(ours[1], its[1], strict=True)]
        shift = [(own - theirs) / std for own, theirs, std in zip(ours[0], its[0], its[1], strict=True)]
        self.register_buffer("scale", a_weight.new_tensor(scale)[:, None, None])
        self.register_buffer("shift", a_weight.new_tensor(shift)[:, None, None])

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if self.get_buffer("scale").device != images.device:  # the student's weights may lie on the host
            self.to(images.device)
        half = images.dtype if images.dtype in _HALF else None
        if not self._is_alike:
            images = images * self.get_buffer("scale") + self.get_buffer("shift")
        with torch.autocast(images.device.type, half, enabled=half is not None):
            return self.network(images)


def _settings(config: Config) -> Settings:
    assert isinstance(config.method, Settings)
    return config.method


def _require(ours: Settings, classes: list[str]) -> None:
    """Refuse a teacher that is not the one that the configuration names.

    Raises:
        InputError: another file, or other classes.
    """
    there, name = checksum(ours.teacher), Path(ours.teacher).name
    if not ours.teacher_sha256:
        raise InputError(f"method.teacher_sha256 is not set; that of {name} is {there}; {_COMMAND}")
    if there != ours.teacher_sha256:
        raise InputError(
            f"method.teacher={ours.teacher}: another file than the one that method.teacher_sha256 names (its SHA-256 "
            f"is {there}); use the file that the run began with, or another run.dir"
        )
    if classes != ours.classes:
        raise InputError(f"method.classes: not those of {name}, which are {len(classes)}; {_COMMAND}")


def _require_labels(ours: Settings, config: Config) -> None:
    """Refuse labelled images of other classes: a label is a number in the list of its folder.

    Raises:
        InputError: they are of others.
    """
    folder = ours.support.shards or str(corpus_settings(config.data)[0][0])
    if ours.label_weight > 0 and Path(folder).is_dir() and list(read_manifest(folder).classes) != ours.classes:
        raise InputError(f"method.label_weight={ours.label_weight:g}: the classes of {folder} are not method.classes")
