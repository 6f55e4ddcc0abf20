"""Context encoder: a part of an image is to be made out of what is around it (arXiv 1604.07379).

The naive loop, of a step::

    for i in images:
        hole = a square or four, and its rim the `overlap` pixels next to what is around it
        seen = i with the mean in the hole, but not in its rim
        made = decoder(backbone's maps of seen)
        filled = i with `made` in hole and rim
        judged += (softplus(-discriminator(i)) + softplus(discriminator(filled))) / 2 / B
    move the discriminator by the gradient of judged
    for i in images:                                        # again, by the new discriminator
        error = mean over hole and rim of weight * (made - i) ** 2, of weight 10 in the rim and 1 in the hole
        loss += ((1 - adversarial) * error + adversarial * softplus(-discriminator(filled))) / B
    move backbone and decoder by the gradient of loss

Departures from the published method: BatchNorm in backbone and decoder, whose statistics are those of images with
holes, by which evaluation sees whole ones; maps are enlarged by repetition and convolutions; pixels are in units of
their deviation; the generator wants scores up, as is usual, instead of the negative of the discriminator's loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from largescale.config import Config, require
from largescale.config.schema import MethodConfig
from largescale.config.setting import setting
from largescale.data.length import Length
from largescale.data.task_views import masks
from largescale.data.views import Views
from largescale.methods.choice import Choice
from largescale.methods.float32 import at_least_float32
from largescale.methods.hole import Hole, hole_loss, hole_signs
from largescale.methods.method import Method, Output, Panel, Row, Sign, Symptom
from largescale.methods.pictures import Pictures, in_range
from largescale.methods.unexplained import DAMAGE, moments_of, nothing_made, said_missing, variance_of
from largescale.models.backbones import build_backbone, feature_map, map_channels, map_side
from largescale.models.channelwise import ChannelwiseLinear
from largescale.models.constant_weights import constant_weights
from largescale.models.decoders import DenseDecoder
from largescale.models.discriminators import ConvDiscriminator
from largescale.models.heads import HeadConv2d
from largescale.models.running_statistics import statistics_untouched
from largescale.optim.roles import MAIN, Role

_FOOLED_NEVER = 0.99
_RIM, _RIM_OF = 7, 227
"""Pixels of the published overlap, and along the side of views."""
DISCRIMINATOR = "discriminator"


@dataclass
class Settings(MethodConfig):
    """The context encoder's keys under `method`."""

    mask: str = setting(
        "blocks",
        "Which part is to be made: four `blocks` at random places that may overlap, or the `centre`, whose edges are "
        "always at the same place.",
        one_of=("blocks", "centre"),
    )
    masked: float = setting(0.25, "Share of the image that is to be made.", above=0, below=1)
    overlap: int = setting(
        7, "Pixels at the edge of that part that are seen, so that what is made has to fit.", at_least=0, at_most=2**12
    )
    overlap_weight: float = setting(10.0, "Weight of errors there.", at_least=0, at_most=1e6, used_if="method.overlap")
    decoder: list[int] = setting(
        [512, 256, 128, 64, 32],
        "Widths of the decoder's layers, which enlarge maps step by step to the size of what is made.",
        at_least=1,
        at_most=2**24,
        min_length=1,
    )
    adversarial: float = setting(
        0.001, "Weight of the adversarial loss; that of errors is the rest to 1. 0 leaves it out.", at_least=0, below=1
    )
    discriminator: list[int] = setting(
        [64, 128, 256, 512],
        "Widths of the discriminator's layers, each of which halves the side.",
        at_least=1,
        at_most=2**24,
        min_length=1,
        used_if="method.adversarial",
    )
    discriminator_lr_factor: float = setting(
        0.1,
        "Learning rate of the discriminator, as a multiple of optim.lr.",
        at_least=0,
        at_most=1e6,
        used_if="method.adversarial",
    )

    def side(self, size: int) -> int:
        """Of the square that the decoder makes, in views of so many pixels."""
        return masks.centre_side(self.masked, size) if self.mask == "centre" else size

    def check(self, config: Config) -> None:
        """One view with a hole in it that the discriminator can halve."""
        nums = [group.num for group in config.data.crops]
        require(nums == [1], "data.crops", nums, "one group of one view, such as [{num: 1, size: 224}]")
        size = config.data.crops[0].size
        length = self.side(size) if self.mask == "centre" else masks.block_side(self.masked, size)
        fits = f"less than half of the {length} px of a side of what is made, or a larger method.masked"
        require(2 * self.overlap < length, "method.overlap", self.overlap, fits)
        most = self.side(size).bit_length() - 1
        if self.adversarial > 0:
            found = len(self.discriminator)
            what = f"at most {most} layers, which halve {self.side(size)} px to one"
            require(found <= most, "method.discriminator", self.discriminator, what)


class ContextEncoder(Method):
    """Backbone, a decoder of its maps, and a discriminator. Evidence: scores of what is made, or of both."""

    title = "Context encoder"
    reference = "pretext/context_encoder"
    Settings = Settings
    spoilers = DAMAGE
    pictures = Pictures(
        "The hole filled",
        "Images with the mean colour where they are hidden, and with what the decoder makes there and in the rim.",
        ("seen", "filled", "image"),
    )

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self._run = _settings(config), config
        size = config.data.crops[0].size
        self._side = self.config.side(size)
        self.backbone, self.num_features = build_backbone(config.model)
        channels = map_channels(config.model, self.num_features)
        self.bottleneck = nn.Sequential(
            ChannelwiseLinear(channels, map_side(config.model, size)),
            HeadConv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        self.decoder = DenseDecoder(channels, self.config.decoder)
        self.signs = {"hole_error": Sign(), "rim_error": Sign()} | moments_of("hole")
        if self.config.adversarial > 0:
            self.discriminator = ConvDiscriminator(self._side, self.config.discriminator)
            self.objectives = (DISCRIMINATOR, MAIN)
            self.signs |= {"adversarial_loss": Sign(), "discriminator_loss": Sign(), "discriminator_accuracy": Sign()}

    @classmethod
    def suited(cls, config: Config, length: Length) -> dict[str, Choice]:
        """A rim in proportion to views."""
        side = config.data.crops[0].size
        rim = f"of views of {side} px, as {_RIM} of {_RIM_OF} px published"
        return {"overlap": Choice(max(1, _RIM * side // _RIM_OF), rim)}

    def roles(self) -> list[Role]:
        """The discriminator is moved by its own objective, at its own rate."""
        if self.config.adversarial == 0:
            return []
        factor = self.config.discriminator_lr_factor
        return [Role("discriminator", "discriminator.*", lr_factor=factor, objective=DISCRIMINATOR)]

    def forward(self, views: Views, step: int, objective: str = MAIN) -> Output:
        """Either loss of a micro-batch. Collectives: none but those of BatchNorm."""
        [whole] = views.images
        hole = self.hole(views.ids, whole.shape[-1], step)
        seen = hole.hidden_in(whole).contiguous(memory_format=torch.channels_last)
        if objective == DISCRIMINATOR:
            # The other objective makes the same again, with a graph, and feeds running statistics.
            with torch.no_grad(), statistics_untouched(self._generator()):
                made = self.make(seen)
            return self._judged(hole.part_of(whole), made, hole)
        made = self.make(seen)
        wanted = hole.part_of(whole).to(made.dtype)
        error, signs = hole_loss(made, wanted, hole, self.config.overlap_weight), hole_signs(made, wanted, hole)
        if self.config.adversarial == 0:
            return Output(error, signs, {})
        with constant_weights(self.discriminator), statistics_untouched(self.discriminator.modules()):
            scores = at_least_float32(self.discriminator(hole.filled(wanted, made)))
        fooled = softplus(-scores).mean()
        share = self.config.adversarial
        signs["adversarial_loss"] = fooled.detach()
        return Output((1 - share) * error + share * fooled, signs, {"scores": scores.detach()})

    def make(self, seen: Tensor) -> Tensor:
        """Images with the mean in their holes [B, 3, S, S] to what the decoder makes of them, [B, 3, R, R]."""
        return self.decoder(self.bottleneck(feature_map(self.backbone, seen)), self._side)

    def draw(self, views: Views) -> list[Tensor]:
        """Images with their holes, with what is made in them, and as they were."""
        [whole] = views.images
        hole = self.hole(views.ids, whole.shape[-1], 0)
        seen = hole.hidden_in(whole)
        filled = whole.clone()
        hole.part_of(filled).copy_(hole.filled(hole.part_of(whole), self.make(seen)))
        return [in_range(images, self._run) for images in (seen, filled, whole)]

    def hole(self, ids: Tensor, size: int, step: int) -> Hole:
        """What is to be made of images."""
        ours = self.config
        if ours.mask == "centre":
            wanted = masks.centre(ids, ours.masked, size)
        else:
            wanted = masks.blocks(ids, ours.masked, size, seed=self._run.run.seed, step=step)
        return Hole(wanted, masks.shrunk(wanted, ours.overlap), self._side)

    def _judged(self, whole: Tensor, made: Tensor, hole: Hole) -> Output:
        whole = whole.to(made.dtype)
        real, fake = (at_least_float32(self.discriminator(images)) for images in (whole, hole.filled(whole, made)))
        loss = (softplus(-real).mean() + softplus(fake).mean()) / 2
        right = ((real.detach() > 0).to(real.dtype).mean() + (fake.detach() < 0).to(fake.dtype).mean()) / 2
        signs = {"discriminator_loss": loss.detach(), "discriminator_accuracy": right}
        return Output(loss, signs, {"scores": torch.stack([real, fake]).detach()})

    def _generator(self) -> list[nn.Module]:
        return [module for part in (self.backbone, self.bottleneck, self.decoder) for module in part.modules()]

    def measures(self, loss: float, signs: dict[str, Tensor], num_images: int) -> dict[str, float]:
        """Errors, and that in the hole over the variance of pixels there, that of the mean colour."""
        variance = variance_of("hole", signs)
        own = {"unexplained": float(signs["hole_error"]) / variance, "pixel_variance": variance}
        return own | super().measures(loss, signs, num_images)

    @classmethod
    def brief(cls, row: Row) -> str:
        """What of the variance is not in what is made."""
        return said_missing(row)

    @classmethod
    def symptoms(cls, config: Config) -> list[Symptom]:
        """That holes are filled with the mean colour, and that the discriminator is never fooled."""
        ours = _settings(config)
        rates = f"optim.lr={config.optim.lr / 3:.2g} or {3 * config.optim.lr:.2g}"
        weaker = f"method.discriminator_lr_factor={ours.discriminator_lr_factor / 3:.2g}"
        unfilled = nothing_made(
            "holes are not filled",
            of="hidden pixels",
            where="what is made",
            maker="the decoder",
            remedy=f"Try, in another run.dir, {rates}"
            + (", or method.adversarial=0, with which features were trained in the paper" if ours.adversarial else ""),
        )
        never = Symptom(
            "discriminator is never fooled",
            sign=lambda row: row.get("discriminator_accuracy"),
            sick=(_FOOLED_NEVER, 1),
            recovery="down",
            seen=lambda row: f"it tells {row['discriminator_accuracy']:.1%} of images and fillings apart",
            remedy=f"Try, in another run.dir, {weaker}, or method.adversarial=0; errors alone still train the backbone",
            meaning="the adversarial loss does not say what would be better",
            in_settings=True,
        )
        return [unfilled, never] if ours.adversarial else [unfilled]

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """Errors, and the discriminator against chance."""
        curves = {"in the hole": "hole_error", "in its rim": "rim_error", "of the mean colour": "pixel_variance"}
        errors = Panel("Mean square of what is wrong", curves)
        if _settings(config).adversarial == 0:
            return [errors]
        judged = {"share told right": "discriminator_accuracy", "loss": "discriminator_loss"}
        return [errors, Panel("Discriminator (chance: 0.5 right, a loss of 0.69)", judged)]


def _settings(config: Config) -> Settings:
    return cast(Settings, config.method)
