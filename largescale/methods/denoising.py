"""Denoising autoencoder: an image is to be made out of what is left of it (Vincent et al., ICML 2008; here
convolutional and trained from end to end).

The naive loop::

    for i in images:
        damaged = i plus noise, then a share of its pixels set to the mean
        loss += mean((decoder(backbone's maps of damaged) - i) ** 2) / B

Departures from the published method: layers are trained together, not one after the other with tied weights; the error
is the mean square of normalised pixels, not a cross entropy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from largescale.config import Config, require
from largescale.config.schema import MethodConfig
from largescale.config.setting import setting
from largescale.data.task_views import masks
from largescale.data.views import Views
from largescale.methods.embedding_method import EmbeddingMethod, Named
from largescale.methods.method import Output, Panel, Row, Sign, Symptom
from largescale.methods.pictures import Pictures, in_range
from largescale.methods.unexplained import moments_of, nothing_made, said_missing, variance_of
from largescale.models.backbones import build_backbone, feature_map
from largescale.models.decoders import DenseDecoder


@dataclass
class Settings(MethodConfig):
    """The denoising autoencoder's keys under `method`."""

    masked: float = setting(0.25, "Share of pixels that are hidden: set to the mean.", at_least=0, below=1)
    mask: str = setting(
        "pixels",
        "Which are hidden: `pixels` here and there, four `blocks` that may overlap, or the `centre`.",
        one_of=("pixels", "blocks", "centre"),
        used_if="method.masked",
    )
    noise: float = setting(
        0.0, "Standard deviation of noise in pixels that are not hidden, in units of data.std.", at_least=0, at_most=1e3
    )
    decoder: list[int] = setting(
        [512, 256, 128, 64, 32],
        "Widths of the decoder's layers, which enlarge maps step by step to the size of the image.",
        at_least=1,
        at_most=2**24,
        min_length=1,
    )

    def check(self, config: Config) -> None:
        """One view, and something to be undone."""
        nums = [group.num for group in config.data.crops]
        require(nums == [1], "data.crops", nums, "one group of one view, such as [{num: 1, size: 224}]")
        require(self.masked > 0 or self.noise > 0, "method.masked", self.masked, "above 0, or method.noise above 0")


class Denoising(EmbeddingMethod):
    """Backbone and a decoder of its maps. Evidence: none."""

    title = "Denoising autoencoder"
    reference = "pretext/denoising"
    Settings = Settings
    pictures = Pictures(
        "What was hidden, and restored",
        "Images of which a part is hidden or noisy, and what the decoder makes of them.",
        ("damaged", "restored", "image"),
    )

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self._run = _settings(config), config
        self.backbone, self.num_features = build_backbone(config.model)
        self.decoder = DenseDecoder(self.num_features, self.config.decoder)
        self.signs = {"error": Sign(), "input_error": Sign()} | moments_of("pixel")

    def task_views(self, views: Views, step: int) -> Views:
        """The damaged view and the whole one, both [B, 3, S, S]."""
        [whole] = views.images
        damaged = whole
        if self.config.noise > 0:
            noise = masks.noise(views.ids, whole.shape[-1], seed=self._run.run.seed, step=step)
            damaged = damaged + self.config.noise * noise.to(whole.dtype)
        if self.config.masked > 0:
            damaged = damaged.masked_fill(self._hidden(views.ids, whole.shape[-1], step), 0)
        return views._replace(images=[damaged.contiguous(memory_format=torch.channels_last), whole])

    def _hidden(self, ids: Tensor, side: int, step: int) -> Tensor:
        if self.config.mask == "centre":
            return masks.centre(ids, self.config.masked, side)
        draw = masks.pixels if self.config.mask == "pixels" else masks.blocks
        return draw(ids, self.config.masked, side, seed=self._run.run.seed, step=step)

    def embed(self, views: Views) -> Named:
        """`images` [1, B, 3, S, S], made of damaged ones."""
        damaged = views.images[0]
        return {"images": self.decoder(feature_map(self.backbone, damaged), damaged.shape[-1])[None]}

    def draw(self, views: Views) -> list[Tensor]:
        """Damaged ones, those that the decoder makes of them, and images as they were."""
        views = self.task_views(views, 0)
        damaged, whole = views.images
        return [in_range(images, self._run) for images in (damaged, self.embed(views)["images"][0], whole)]

    def targets(self, views: Views) -> Named:
        """`damaged` and `whole` [1, B, 3, S, S]."""
        damaged, whole = views.images
        return {"damaged": damaged[None], "whole": whole[None]}

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The mean square of what is wrong with images. Collectives: none."""
        made = inputs["images"][0]
        made = made.to(torch.promote_types(made.dtype, torch.float32))
        whole, damaged = inputs["whole"][0].to(made.dtype), inputs["damaged"][0].to(made.dtype)
        error = (made - whole).square().mean()
        signs = {
            "error": error.detach(),
            "input_error": (damaged - whole).square().mean(),
            "pixel_mean": whole.mean((0, 2, 3)),
            "pixel_square": whole.square().mean((0, 2, 3)),
        }
        return Output(error, signs, {})

    def measures(self, loss: float, signs: dict[str, Tensor], num_images: int) -> dict[str, float]:
        """Errors, and that of the images made over the variance of pixels, that of the mean colour everywhere."""
        variance = variance_of("pixel", signs)
        own = {"unexplained": float(signs["error"]) / variance, "pixel_variance": variance}
        return own | super().measures(loss, signs, num_images)

    @classmethod
    def brief(cls, row: Row) -> str:
        """What of the variance is not in the images made."""
        return said_missing(row)

    @classmethod
    def symptoms(cls, config: Config) -> list[Symptom]:
        """That the images made are no better than the mean colour everywhere."""
        return [
            nothing_made(
                "images are not restored",
                of="pixels",
                where="the images made",
                maker="the decoder",
                remedy=f"Try, in another run.dir, optim.lr={config.optim.lr / 3:.2g} or {3 * config.optim.lr:.2g}, or "
                f"method.masked={_settings(config).masked / 2:.2g}",
            )
        ]

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """Errors of what is made and of what it is made of."""
        curves = {"of images made": "error", "of damaged images": "input_error", "of the mean colour": "pixel_variance"}
        return [Panel("Mean square of what is wrong", curves)]


def _settings(config: Config) -> Settings:
    assert isinstance(config.method, Settings)
    return config.method
