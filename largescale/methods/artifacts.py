"""Spotting artifacts: was an image damaged and repaired, and where? (arXiv 1806.05024)

The naive loop, of a step behind the first `autoencoder_epochs`, in which the autoencoder alone learns to make images::

    for i in images:
        code = encoder(i)                                   # encoder and decoder stay as they are from now on
        whole = decoder(code)
        dropped = entries of the code at random, each with all its channels
        code[dropped] = means of their neighbours
        repaired = decoder(code), with a residual block in front of each layer that enlarges, for dropped places alone
        fooling += (softplus(-answer(repaired)) + repair_weight * mean over kept places of (repaired - whole) ** 2) / B
    move the repair network by the gradient of fooling
    for i in images:                                        # again, by the new repair network
        loss += (softplus(-answer(whole)) + softplus(answer(repaired))) / 2 / B
        loss += entry_weight * binary cross entropy of `entries` with what was kept, of both, / B
    move the backbone and both heads by the gradient of loss

`answer` and `entries` are linear heads of the backbone. What is whole has been through the autoencoder too, so that
blur says nothing.

The backbone sees whole and repaired images together for both losses, so that BatchNorm has the same statistics.

Departures from the published method: maps are enlarged by repetition, pixels are in units of their deviation without a
tanh, the mean of neighbours leaves the place itself out, what is kept is compared with the autoencoder's image and not
with the image itself, no block is in front of the last convolution and none sees what was dropped, entries are told by
a linear head of the features and not by a convolution of the map, and both networks are moved one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, softplus

from largescale.config import Config, require
from largescale.config.schema import MethodConfig
from largescale.config.setting import setting
from largescale.data.length import Length
from largescale.data.task_views import masks
from largescale.data.views import Views
from largescale.methods.choice import Choice
from largescale.methods.float32 import at_least_float32
from largescale.methods.method import Method, Output, Panel, Row, Sign, Symptom
from largescale.methods.pictures import Pictures, in_range
from largescale.methods.unexplained import DAMAGE, moments_of, said_missing, variance_of
from largescale.models.autoencoders import ConvAutoencoder, Repair, code_side, filled_from_neighbours
from largescale.models.backbones import build_backbone
from largescale.models.constant_weights import constant_weights
from largescale.models.evaluation_mode import running_statistics_used
from largescale.models.running_statistics import statistics_untouched
from largescale.optim.roles import MAIN, Role

AUTOENCODER, REPAIR = "autoencoder", "repair"
_CHANCE, _TOO_EASY = 0.52, 0.998
_LEAST_CODE = 7
"""Entries along the side of a code that `suited` asks for; published ones have 8."""


@dataclass
class Settings(MethodConfig):
    """The keys of spotting artifacts under `method`."""

    autoencoder: list[int] = setting(
        [32, 64, 128, 256, 512],
        "Widths of the autoencoder's maps, from the image to the code; each but the first halves the side.",
        at_least=1,
        at_most=2**24,
        min_length=2,
    )
    autoencoder_epochs: float = setting(
        10.0, "Epochs at the start in which the autoencoder alone is trained.", above=0, at_most=1e6
    )
    dropped: float = setting(0.7, "Share of the code's entries that are dropped.", above=0, below=1)
    entry_weight: float = setting(0.1, "Weight of telling which entries were dropped.", at_least=0, at_most=1e6)
    repair_weight: float = setting(
        30.0, "Weight of what the repair network changes where nothing was dropped.", at_least=0, at_most=1e6
    )

    def check(self, config: Config) -> None:
        """One view, and a code with neighbours."""
        nums = [group.num for group in config.data.crops]
        require(nums == [1], "data.crops", nums, "one group of one view, such as [{num: 1, size: 224}]")
        side = code_side(config.data.crops[0].size, self.autoencoder)
        require(side > 1, "method.autoencoder", self.autoencoder, "fewer layers, so that 2 x 2 entries are left")


class Artifacts(Method):
    """Backbone, two heads, an autoencoder, and a network that repairs. Evidence: answers."""

    title = "Spotting artifacts"
    reference = "pretext/artifacts"
    Settings = Settings
    spoilers = DAMAGE
    pictures = Pictures(
        "Artifacts",
        "Images that the autoencoder makes, the same of damaged codes and repaired, and which entries were dropped.",
        ("whole", "repaired", "dropped", "image"),
    )
    objectives = (AUTOENCODER, REPAIR, MAIN)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self._run = _settings(config), config
        widths = self.config.autoencoder
        self._code_side = code_side(config.data.crops[0].size, widths)
        self.backbone, self.num_features = build_backbone(config.model)
        self.answer = nn.Linear(self.num_features, 1)
        self.entries = nn.Linear(self.num_features, self._code_side**2)
        self.autoencoder, self.repair = ConvAutoencoder(widths), Repair(widths[:0:-1])
        names = ("autoencoder_error", "fooling_loss", "repair_error", "task_accuracy", "entry_accuracy")
        self.signs = {name: Sign() for name in names} | moments_of("pixel")

    def of_run(self, length: Length) -> None:
        """When the autoencoder is done."""
        super().of_run(length)
        self.start = first_step(self.config, length)

    def objectives_of(self, step: int) -> tuple[str, ...]:
        """At first the autoencoder's, then the others."""
        return (AUTOENCODER,) if step < self.start else (REPAIR, MAIN)

    def roles(self) -> list[Role]:
        """Autoencoder and repair network have objectives of their own."""
        return [Role(name, f"{name}.*", objective=name) for name in (AUTOENCODER, REPAIR)]

    def forward(self, views: Views, step: int, objective: str = MAIN) -> Output:
        """The loss of an objective. Collectives: none but those of BatchNorm."""
        [images] = views.images
        if objective == AUTOENCODER:
            return self._made(images, self.autoencoder.decode(self.autoencoder.encode(images), images.shape[-1]))
        dropped = self.dropped(views.ids, step)
        with running_statistics_used(self.autoencoder.modules()):
            with torch.no_grad():
                code = self.autoencoder.encode(images)
                whole = self.autoencoder.decode(code, images.shape[-1])
                code = filled_from_neighbours(code, dropped)
            if objective == REPAIR:
                with constant_weights(self.autoencoder):
                    repaired = self.repaired(code, images.shape[-1], dropped)
                return self._fooling(repaired, whole, dropped)
            # The other objective makes the same with a graph, and feeds running statistics.
            with torch.no_grad(), statistics_untouched(self.repair.modules()):
                repaired = self.repaired(code, images.shape[-1], dropped)
        return self._told(repaired, whole, dropped)

    def dropped(self, ids: Tensor, step: int) -> Tensor:
        """Entries of codes, bool [B, 1, c, c]."""
        return masks.entries(ids, self.config.dropped, self._code_side, seed=self._run.run.seed, step=step)

    def draw(self, views: Views) -> list[Tensor]:
        """Images made by the autoencoder, repaired ones, where entries were dropped (white), and images as such."""
        [images] = views.images
        side, dropped = images.shape[-1], self.dropped(views.ids, 0)
        code = self.autoencoder.encode(images)
        whole = self.autoencoder.decode(code, side)
        repaired = self.repaired(filled_from_neighbours(code, dropped), side, dropped)
        where = interpolate(dropped.to(images.dtype), size=[side] * 2).expand_as(images)
        whole, repaired, images = (in_range(one, self._run) for one in (whole, repaired, images))
        return [whole, repaired, where, images]

    def repaired(self, code: Tensor, side: int, dropped: Tensor) -> Tensor:
        """Images made of a code whose dropped entries were filled."""
        return self.autoencoder.decode(code, side, self.repair, dropped)

    def _made(self, images: Tensor, made: Tensor) -> Output:
        made, images = at_least_float32(made), at_least_float32(images)
        error = (made - images).square().mean()
        signs = {"pixel_mean": images.mean((0, 2, 3)), "pixel_square": images.square().mean((0, 2, 3))}
        return Output(error, signs | {"autoencoder_error": error.detach()}, {})

    def _fooling(self, repaired: Tensor, whole: Tensor, dropped: Tensor) -> Output:
        with statistics_untouched(self.backbone.modules()):
            answers = at_least_float32(self.answer(self.backbone(torch.cat([whole, repaired]))))[len(whole) :]
        fooling = softplus(-answers).mean()
        square = (at_least_float32(repaired) - at_least_float32(whole)).square().mean(1, keepdim=True)
        kept = interpolate((~dropped).to(square.dtype), size=square.shape[-2:])
        # By image, so that it does not matter how many were kept of those beside it.
        changed = ((square * kept).sum((1, 2, 3)) / kept.sum((1, 2, 3)).clamp_min(1)).mean()
        signs = {"fooling_loss": fooling.detach(), "repair_error": changed.detach()}
        return Output(fooling + self.config.repair_weight * changed, signs, {"answers": answers.detach()})

    def _told(self, repaired: Tensor, whole: Tensor, dropped: Tensor) -> Output:
        features = self.backbone(torch.cat([whole, repaired]))
        answers, entries = at_least_float32(self.answer(features)).flatten(), at_least_float32(self.entries(features))
        real, fake = answers.chunk(2)
        kept = torch.cat([torch.ones_like(dropped), ~dropped]).flatten(1).to(entries.dtype)
        loss = (softplus(-real).mean() + softplus(fake).mean()) / 2
        places = binary_cross_entropy_with_logits(entries, kept)
        signs = {
            "task_accuracy": ((real > 0).to(real.dtype).mean() + (fake <= 0).to(fake.dtype).mean()).detach() / 2,
            "entry_accuracy": ((entries.detach() > 0) == (kept > 0)).to(entries.dtype).mean(),
        }
        return Output(loss + self.config.entry_weight * places, signs, {"answers": answers.detach()})

    def measures(self, loss: float, signs: dict[str, Tensor], num_images: int) -> dict[str, float]:
        """What its objectives report; of the autoencoder, the share of the variance that is missing."""
        own = super().measures(loss, signs, num_images)
        if "autoencoder_error" in own:
            own["unexplained"] = own["autoencoder_error"] / variance_of("pixel", signs)
        return own

    @classmethod
    def suited(cls, config: Config, length: Length) -> dict[str, Choice]:
        """Codes about as fine as published ones, and the autoencoder alone for a quarter of the run at most."""
        settings, side = _settings(config), config.data.crops[0].size
        widths = settings.autoencoder
        while len(widths) > 2 and code_side(side, widths) < _LEAST_CODE:
            widths = widths[:-1]
        entries = code_side(side, widths)
        epochs = min(settings.autoencoder_epochs, float(f"{length.num_steps / length.steps_per_epoch / 4:.2g}"))
        return {
            "autoencoder": Choice(widths, f"of views of {side} px codes of {entries} x {entries} entries"),
            "autoencoder_epochs": Choice(epochs, "a quarter of the run at most"),
        }

    @classmethod
    def without_start(cls) -> dict[str, Any]:
        """A single step of the autoencoder alone."""
        return {"autoencoder_epochs": 1e-6}

    @classmethod
    def complaints(cls, config: Config, length: Length) -> list[str]:
        """Whether anything comes behind the autoencoder."""
        epochs, found = _settings(config).autoencoder_epochs, super().complaints(config, length)
        if first_step(_settings(config), length) < length.num_steps:
            return found
        line = (
            f"method.autoencoder_epochs={epochs:g}: the backbone is trained behind them, and the run ends before; set "
        )
        whole = length.num_steps / length.steps_per_epoch
        return [*found, f"{line}it to a part of the run's {whole:g} epochs, such as {whole / 4:.2g}"]

    @classmethod
    def brief(cls, row: Row) -> str:
        """The share told right, or what the autoencoder lacks."""
        return f" ({row['task_accuracy']:.1%} right)" if "task_accuracy" in row else said_missing(row)

    @classmethod
    def young_epochs(cls, config: Config) -> float:
        """Those of the autoencoder, and one in which artifacts are seen for the first time."""
        return _settings(config).autoencoder_epochs + 1

    @classmethod
    def symptoms(cls, config: Config) -> list[Symptom]:
        """That artifacts are not seen, or that all of them are."""
        return [
            Symptom(
                "artifacts are not seen",
                sign=lambda row: row.get("task_accuracy"),
                sick=(0, _CHANCE),
                recovery="up",
                seen=lambda row: f"{row['task_accuracy']:.1%} of images are told right, repaired or not",
                remedy="Try, in another run.dir, a longer method.autoencoder_epochs, method.dropped="
                f"{(1 + _settings(config).dropped) / 2:.2g} or optim.lr={3 * config.optim.lr:.2g}",
                meaning="repaired images look like others",
                by_rate=True,
            ),
            Symptom(
                "nothing is hidden from the backbone",
                sign=lambda row: row.get("task_accuracy"),
                sick=(_TOO_EASY, 1),
                recovery="down",
                seen=lambda row: f"{row['task_accuracy']:.1%} of images are told right, repaired or not",
                remedy=f"Try, in another run.dir, method.dropped={_settings(config).dropped / 2:.2g}, which is "
                "easier to repair; which entries were dropped is still left to learn",
                meaning="the repair network is beaten, and telling its images from others teaches nothing more",
                in_settings=True,
            ),
        ]

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """What is told, and errors."""
        told = {"images told right": "task_accuracy", "entries told right": "entry_accuracy"}
        errors = {"autoencoder": "autoencoder_error", "changed by repair where nothing was dropped": "repair_error"}
        return [Panel("Task (chance: 0.5)", told, limits=(0, 1.05)), Panel("Mean squares", errors)]


def first_step(settings: Settings, length: Length) -> int:
    """The first one behind the autoencoder's."""
    return max(1, round(settings.autoencoder_epochs * length.steps_per_epoch))


def _settings(config: Config) -> Settings:
    return cast(Settings, config.method)
