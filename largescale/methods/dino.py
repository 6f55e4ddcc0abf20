"""DINO: a network predicts the output of its own running average, on other views of the image (arXiv 2104.14294), here
for convolutional backbones.

The teacher sees the large views alone, the student all. Loss for outputs t of the teacher, s of the student and a
centre c, the naive loop::

    for a in large views:
        q = softmax((t[a] - c) / teacher_temperature)
        for v in all views except a:
            loss += -(q * log_softmax(s[v] / temperature)).sum(-1).mean()
    loss /= num large views * (num views - 1)
    c = centre_momentum * c + (1 - centre_momentum) * t.mean()  # over all ranks, after the loss of the whole batch

Outputs are cosines with rows of a last layer. Centring alone would end in uniform outputs, sharpening (the lower
temperature of the teacher) alone in one output for all images; together they end in neither.

Departures: weights of the head are drawn uniformly instead of normally, with the published standard deviation; the
teacher's temperature rises by the step, not by the epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import takewhile

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import linear, log_softmax, normalize

from largescale.config import Config, MethodConfig
from largescale.config.setting import setting
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.distributed.collectives import exchanging
from largescale.methods.embedding_method import Named
from largescale.methods.joint_embedding import JointEmbedding, unit
from largescale.methods.losses import swapped_prediction
from largescale.methods.method import Average, Output, Panel, Row, Sign, Symptom
from largescale.methods.multi_crop import by_size, num_large, require_two_large
from largescale.methods.replicated import replicated
from largescale.methods.teachers import cosine_momentum, following, teacher_of
from largescale.models.backbones import build_backbone
from largescale.models.heads import hidden_widths
from largescale.optim.roles import Role
from largescale.processes import world_size

_UNIFORM = 0.995
"""Entropy of the teacher's outputs, as a share of ln K, above which images cannot be told apart."""
_ONE_OUTPUT = 0.95
"""Share of a batch with the same largest output above which that is the output of all."""
_NOTHING_TO_LEARN = 0.02
"""Divergence of student and teacher, as a share of ln K, below which there is nothing to learn."""
_INITIAL_STD = 0.02


@dataclass
class Settings(MethodConfig):
    """DINO's keys under `method`."""

    hidden: list[int] = hidden_widths([2048, 2048])
    embedding: int = setting(256, "Width of the unit vectors below the outputs.", at_least=1, at_most=2**24)
    outputs: int = setting(
        65536, "Outputs that images are told apart by; 4096 for small data.", at_least=2, at_most=2**24
    )
    temperature: float = setting(0.1, "Divides the student's outputs.", at_least=1e-6, at_most=1e6)
    teacher_temperature: float = setting(
        0.04, "Divides the teacher's outputs; that of the student would not sharpen them.", at_least=1e-6, at_most=1e6
    )
    warmup_teacher_temperature: float = setting(
        0.04,
        "The teacher's temperature at the start.",
        at_least=1e-6,
        at_most=1e6,
        used_if="method.warmup_teacher_epochs",
    )
    warmup_teacher_epochs: float = setting(0.0, "Epochs until it has changed.", at_least=0, at_most=1e9)
    momentum: float = setting(
        0.996, "Fraction of its weights that the teacher keeps per step; rises to 1.", at_least=0, at_most=1
    )
    centring: bool = setting(True, "Subtract the centre from the teacher's outputs; without it training collapses.")
    centre_momentum: float = setting(
        0.9, "Fraction of itself that the centre keeps per step.", at_least=0, at_most=1, used_if="method.centring"
    )
    freeze_last_layer_epochs: float = setting(
        1.0, "Epochs at the start during which the last layer stays fixed.", at_least=0, at_most=1e9
    )

    def check(self, config: Config) -> None:
        """The teacher compares two large views of an image, which come first."""
        require_two_large(config)


class DINO(JointEmbedding):
    """Student and teacher, each a backbone, a projection head and a last layer, and the centre.

    The centre is the same on all ranks and in all micro-batches of a step. Evidence: `teacher_embeddings` [A, B, D] of
    the large views, and the `centre` [K] that was subtracted.
    """

    title = "DINO"
    reference = "dino/resnet50_100ep"
    encoder_name = "teacher.backbone"
    head_name = "teacher.projection"
    Settings = Settings
    centre: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        settings = self.config = _settings(config)
        self.num_large = num_large(config.data.crops)
        self._batch = config.train.global_batch
        self.backbone, self.num_features = build_backbone(config.model)
        self.projection = Projection(self.num_features, settings.hidden, settings.embedding)
        self.last_layer = UnitRows(settings.embedding, settings.outputs)
        self.teacher = teacher_of(backbone=self.backbone, projection=self.projection, last_layer=self.last_layer)
        self.signs = {
            **self.embedding_signs(settings.embedding),
            "teacher_entropy": Sign(),
            "divergence": Sign(),
            "same_output": Sign(),
        }
        self.register_buffer("centre", torch.zeros(settings.outputs), persistent=False)
        self._total: Tensor | None = None
        self._seen = 0

    def embed(self, views: Views) -> Named:
        """`outputs` [V, B, K] of the student for all views."""
        _, outputs = _outputs(self.backbone, self.projection, self.last_layer, views.images)
        return {"outputs": outputs.unflatten(0, (-1, len(views.ids)))}

    def targets(self, views: Views) -> Named:
        """`teacher_outputs` [A, B, K] and `teacher_embeddings` [A, B, D], unit vectors, of the large views."""
        large = list(takewhile(lambda images: images.shape[-1] == views.images[0].shape[-1], views.images))
        z, outputs = _outputs(self.teacher["backbone"], self.teacher["projection"], self.teacher["last_layer"], large)
        by_view = (-1, len(views.ids))
        return {"teacher_outputs": outputs.unflatten(0, by_view), "teacher_embeddings": z.unflatten(0, by_view)}

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The loss of a batch, or of one of its micro-batches; all of a step share a centre.

        Collectives: one all-reduce of K numbers per step.
        """
        student, teacher, z = (inputs[name] for name in ("outputs", "teacher_outputs", "teacher_embeddings"))
        with torch.autocast(student.device.type, enabled=False):
            centre = self.centre.to(teacher.dtype)
            shifted = teacher - centre if self.config.centring else teacher
            log_q = log_softmax(shifted / self.teacher_temperature(step), dim=-1)
            loss = swapped_prediction(student, log_q.exp(), self.config.temperature)
            signs = self.watch_embeddings(z[0], z[1]) | _watch_outputs(log_q, loss.detach())
            self._recentre(teacher)
        return Output(loss, signs, {"teacher_embeddings": z, "centre": centre})

    def teacher_temperature(self, step: int) -> float:
        """That of a step, rising on a line during its warm-up."""
        first, last = self.config.warmup_teacher_temperature, self.config.teacher_temperature
        steps = self.config.warmup_teacher_epochs * self.length.steps_per_epoch
        return last if step >= steps else first + (last - first) * step / steps

    def _recentre(self, outputs: Tensor) -> None:
        """Move the centre to the mean of a step's outputs [A, B, K], once its last micro-batch is through."""
        own = outputs.sum(0).sum(0)
        total = own if self._total is None else self._total + own
        self._total, self._seen = total, self._seen + outputs.shape[1]
        if self._seen < self._batch // world_size():
            return
        self._total, self._seen = None, 0
        if world_size() > 1:
            with exchanging("centre of the outputs"):
                dist.all_reduce(total)
        mean = total / (self.num_large * self._batch)
        self.centre = self.centre.lerp(mean.to(self.centre.dtype), 1 - self.config.centre_momentum)

    def roles(self) -> list[Role]:
        """The last layer begins to train later, and gives cosines in float32."""
        steps = round(self.config.freeze_last_layer_epochs * self.length.steps_per_epoch)
        return [Role("last layer", "*last_layer.*", frozen_until=steps, float32=True)]

    def averages(self) -> list[Average]:
        """The teacher's weights follow; it has running statistics of its own."""
        return following("teacher", "backbone", "projection", "last_layer")

    def average_momentum(self, step: int) -> float:
        """Rises to 1 over the run."""
        return cosine_momentum(self.config.momentum, step, self.length.num_steps)

    def state(self, mesh: DeviceMesh) -> dict[str, Tensor]:
        """The centre, which all ranks hold."""
        return {"centre": replicated(self.centre, mesh)}

    def measures(self, loss: float, signs: dict[str, Tensor], num_images: int) -> dict[str, float]:
        """Entropy and divergence as shares of ln K."""
        own, uniform = super().measures(loss, signs, num_images), math.log(self.config.outputs)
        return own | {name: own[name] / uniform for name in ("teacher_entropy", "divergence")}

    @classmethod
    def complaints(cls, config: Config, length: Length) -> list[str]:
        """Also what takes most of the run to come about, and a teacher that does not sharpen."""
        settings, epochs = _settings(config), length.num_steps / length.steps_per_epoch
        late = {
            "freeze_last_layer_epochs": "the last layer trains",
            "warmup_teacher_epochs": "the teacher's temperature is reached",
        }
        found = [
            f"method.{key}={value:g}: {what} only after that, and the run has {epochs:.3g} epochs; "
            f"set method.{key}={epochs / 20:.2g}"
            for key, what in late.items()
            if (value := getattr(settings, key)) > epochs / 2
        ]
        if settings.teacher_temperature >= settings.temperature:
            found.append(
                f"method.teacher_temperature={settings.teacher_temperature:g} does not sharpen the teacher's outputs: "
                f"training collapses to uniform ones; set it below method.temperature={settings.temperature:g}"
            )
        return [*super().complaints(config, length), *found]

    @classmethod
    def brief(cls, row: Row) -> str:
        """How sure the teacher is."""
        if "teacher_entropy" not in row:
            return ""
        return f" (entropy {row['teacher_entropy']:.0%} of ln K, std {row['embedding_std']:.2f})"

    @classmethod
    def symptoms(cls, config: Config) -> list[Symptom]:
        """Outputs that are uniform, or the same for all images. Embeddings may be near each other, as they are at the
        start: the centre takes what is common to them away.
        """
        settings = _settings(config)

        def divergence_of_same_outputs(row: Row) -> float | None:
            return row.get("divergence") if row.get("same_output", 0.0) > _ONE_OUTPUT else None

        return [
            Symptom(
                "uniform outputs",
                sign=lambda row: row.get("teacher_entropy"),
                sick=(_UNIFORM, math.inf),
                recovery="down",
                seen=lambda row: f"the teacher's outputs are uniform (entropy {row['teacher_entropy']:.1%} of ln K)",
                meaning="this looks like collapse for want of sharpening",
                remedy=f"Try, in another run.dir, method.teacher_temperature={settings.teacher_temperature / 2:.2g}",
                in_settings=settings.teacher_temperature >= settings.temperature,
                too_early=lambda row: row.get("epoch", math.inf) < settings.freeze_last_layer_epochs,
            ),
            Symptom(
                "one output for all",
                sign=divergence_of_same_outputs,
                sick=(0, _NOTHING_TO_LEARN),
                recovery="up",
                seen=lambda row: (
                    f"{row['same_output']:.0%} of a batch have the same output and the student predicts it (divergence "
                    f"{row['divergence']:.2%} of ln K)"
                ),
                meaning="this looks like collapse for want of centring",
                remedy=cls.remedy(config),
                in_settings=bool(cls.missing(config)),
            ),
        ]

    @classmethod
    def missing(cls, config: Config) -> str:
        """Centring, where it is off."""
        return "" if _settings(config).centring else "Try, in another run.dir, method.centring=true"

    @classmethod
    def remedy(cls, config: Config) -> str:
        """Centring first, where it is off or slow."""
        fewer = f", or method.outputs={max(2, _settings(config).outputs // 4)}"
        return super().remedy(config) + ("" if cls.missing(config) else fewer)

    @classmethod
    def loss_references(cls, config: Config) -> dict[str, float]:
        """The loss of uniform outputs."""
        return {"ln K (uniform outputs)": math.log(_settings(config).outputs)}

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """What the teacher's outputs do, before the panels of all."""
        curves = {
            "entropy / ln K": "teacher_entropy",
            "divergence of the student / ln K": "divergence",
            "share of a batch with the same output": "same_output",
        }
        return [Panel("Outputs of the teacher", curves, limits=(0, 1.05)), *super().panels(config)]


class Projection(nn.Sequential):
    """Linear layers with biases, GELU between: [N, num_features] to [N, embedding]."""

    def __init__(self, num_features: int, hidden: list[int], embedding: int) -> None:
        layers: list[nn.Module] = []
        for width, next_width in zip([num_features, *hidden], [*hidden, embedding], strict=True):
            layers += [nn.Linear(width, next_width), nn.GELU()]
        super().__init__(*layers[:-1])
        self.finish_initialisation()

    @torch.no_grad()
    def finish_initialisation(self) -> None:
        """Bring new weights to their standard deviation, biases to zero; `models.initialise` calls it as well."""
        for layer in self:
            if isinstance(layer, nn.Linear):
                # They are uniform within 1 / sqrt(in) up to here.
                layer.weight.mul_(_INITIAL_STD * math.sqrt(3 * layer.in_features))
                layer.bias.zero_()


class UnitRows(nn.Linear):
    """A linear layer without bias whose rows count by their direction alone (weight normalisation with gain 1)."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__(width, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] to [N, K]; cosines for unit vectors."""
        return linear(x, normalize(self.weight, dim=1))


def _outputs(
    backbone: nn.Module, projection: nn.Module, last_layer: nn.Module, groups: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Unit embeddings and outputs of views; those of a size go through the backbone together."""
    z = unit(projection(torch.cat([backbone(images) for images in by_size(groups)])))
    with torch.autocast(z.device.type, enabled=False):
        return z, last_layer(z)


@torch.no_grad()
def _watch_outputs(log_q: Tensor, loss: Tensor) -> dict[str, Tensor]:
    """Signs of the teacher's outputs [A, B, K]: entropy; divergence of the student from them; the share of this rank's
    views that agree on the largest one.
    """
    entropy = -(log_q.exp() * log_q).sum(-1).mean()
    largest = log_q.argmax(-1).flatten()
    votes = torch.zeros(log_q.shape[-1], dtype=log_q.dtype, device=log_q.device)
    votes.index_add_(0, largest, torch.ones_like(largest, dtype=log_q.dtype))
    return {"teacher_entropy": entropy, "divergence": loss - entropy, "same_output": votes.max() / len(largest)}


def _settings(config: Config) -> Settings:
    assert isinstance(config.method, Settings)
    return config.method
