"""Denoising autoencoder: an image is to be made out of what is left of it (Vincent et al., ICML 2008), by layers that
are trained together, from end to end, or one after the other (JMLR 11, 2010, section 3.5: stacked).

The naive loop, together::

    for i in images:
        damaged = i plus noise, then a share of its pixels set to the mean
        loss += mean((decoder(backbone's maps of damaged) - i) ** 2) / B

One after the other, in the part of the run that belongs to layer k::

    for i in images:
        x = layer[k - 1](... layer[1](i))                       # of the whole image, by layers that stay as they are
        damaged = x, of which a share of places is set to 0 in all channels (of an image, also noise)
        loss += mean((decoder[k](layer[k](damaged)) - x) ** 2) / B

Departures from the published method: layers are stages of a backbone, parts of the run are of equal length, decoders
have two convolutions and no tied weights; what is hidden of maps are places and not single numbers, and nothing is
added to them; the error is the mean square of normalised pixels and of maps as they are, not a cross entropy.
BatchNorm's statistics are those of damaged images, by which evaluation sees whole ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from largescale.config import Config, require
from largescale.config.schema import MethodConfig
from largescale.config.setting import setting
from largescale.data.length import Length
from largescale.data.task_views import masks
from largescale.data.views import Views
from largescale.methods.embedding_method import EmbeddingMethod, Named
from largescale.methods.float32 import at_least_float32
from largescale.methods.method import Output, Panel, Row, Sign, Symptom
from largescale.methods.pictures import Pictures, in_range
from largescale.methods.unexplained import DAMAGE, moments_of, nothing_made, said_missing, variance_of
from largescale.models.backbones import build_backbone, feature_map, map_channels
from largescale.models.decoders import DenseDecoder
from largescale.models.layer_inputs import input_of, layer_shapes, layers_of, patterns_of
from largescale.optim.roles import MAIN, Role

TOGETHER, ONE_BY_ONE = "together", "one_by_one"


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
        used_if="method.layers=together",
    )
    layers: str = setting(
        TOGETHER,
        "Whether layers learn `together`, or `one_by_one`: each stage of the backbone in an equal part of the run, to "
        "restore its own input, while those below stay as they are.",
        one_of=(TOGETHER, ONE_BY_ONE),
    )

    def check(self, config: Config) -> None:
        """One view, and something to be undone."""
        nums = [group.num for group in config.data.crops]
        require(nums == [1], "data.crops", nums, "one group of one view, such as [{num: 1, size: 224}]")
        require(self.masked > 0 or self.noise > 0, "method.masked", self.masked, "above 0, or method.noise above 0")
        if self.layers == ONE_BY_ONE:
            require(self.masked > 0, "method.masked", self.masked, "above 0, since nothing else hides what maps show")
            require(self.mask == "pixels", "method.mask", self.mask, "`pixels`, whose places maps have too")


class Denoising(EmbeddingMethod):
    """Backbone and a decoder of its maps, or of those of each layer. Evidence: none."""

    title = "Denoising autoencoder"
    reference = "pretext/denoising"
    Settings = Settings
    spoilers = DAMAGE
    pictures = Pictures(
        "What was hidden, and restored",
        "Images of which a part is hidden or noisy, and what the decoder makes of them.",
        ("damaged", "restored", "image"),
    )

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self._run = _settings(config), config
        self.backbone, self.num_features = build_backbone(config.model)
        self.signs = {"error": Sign(), "input_error": Sign()} | moments_of("pixel")
        self._layers: tuple[str, ...] = ()
        if self.config.layers == TOGETHER:
            self.decoder = DenseDecoder(map_channels(config.model, self.num_features), self.config.decoder)
            return
        shapes = layer_shapes(config.model, config.data.crops[0].size)
        self._layers = tuple(shapes)
        self.objectives = (*self._layers[:-1], MAIN)
        self.decoders = nn.ModuleDict(
            {name: DenseDecoder(shape.made, [shape.made], shape.taken) for name, shape in shapes.items()}
        )
        for name in self._layers[1:]:
            own = {"error": Sign(), "input_error": Sign()} | moments_of("pixel", shapes[name].taken)
            self.signs |= {f"{name}_{sign}": what for sign, what in own.items()}

    def objectives_of(self, step: int) -> tuple[str, ...]:
        """That of the layer whose part of the run it is."""
        count = len(self.objectives)
        return (self.objectives[min(step * count // self.length.num_steps, count - 1)],)

    def roles(self) -> list[Role]:
        """Each layer and its decoder have an objective of their own, the last one's being the main one."""
        layers = layers_of(self.backbone) if self._layers else {}
        return [
            Role(name, pattern, objective=name)
            for name in self._layers[:-1]
            for pattern in (*patterns_of(self, layers[name]), f"decoders.{name}.*")
        ]

    def forward(self, views: Any, step: int, part: Any = "all") -> Any:
        """Also of a layer, if they learn one by one. Collectives: none but those of BatchNorm."""
        if not self._layers:
            return super().forward(views, step, part)
        return self._layer_restored(views, step, part if part in self._layers else self._layers[-1])

    def _layer_restored(self, views: Views, step: int, name: str) -> Output:
        first = name == self._layers[0]
        whole = input_of(self.backbone, name, views.images[0])
        damaged = self._damaged(whole, views.ids, step) if first else self._thinned(whole, views.ids, step)
        made = self.decoders[name](layers_of(self.backbone)[name](damaged), whole.shape[-1])
        output = self.loss({"images": made[None], "whole": whole[None], "damaged": damaged[None]}, views.ids, step)
        return output if first else output._replace(signs={f"{name}_{k}": sign for k, sign in output.signs.items()})

    def task_views(self, views: Views, step: int) -> Views:
        """The damaged view and the whole one, both [B, 3, S, S]."""
        [whole] = views.images
        return views._replace(images=[self._damaged(whole, views.ids, step), whole])

    def _damaged(self, whole: Tensor, ids: Tensor, step: int) -> Tensor:
        damaged = whole
        if self.config.noise > 0:
            noise = masks.noise(ids, whole.shape[-1], seed=self._run.run.seed, step=step)
            damaged = damaged + self.config.noise * noise.to(whole.dtype)
        if self.config.masked > 0:
            damaged = damaged.masked_fill(self._hidden(ids, whole.shape[-1], step), 0)
        return damaged.contiguous(memory_format=torch.channels_last)

    def _thinned(self, maps: Tensor, ids: Tensor, step: int) -> Tensor:
        hidden = masks.entries(ids, self.config.masked, maps.shape[-1], seed=self._run.run.seed, step=step)
        return maps.masked_fill(hidden, 0)

    def _hidden(self, ids: Tensor, side: int, step: int) -> Tensor:
        if self.config.mask == "centre":
            return masks.centre(ids, self.config.masked, side)
        draw = masks.pixels if self.config.mask == "pixels" else masks.blocks
        return draw(ids, self.config.masked, side, seed=self._run.run.seed, step=step)

    def embed(self, views: Views) -> Named:
        """`images` [1, B, 3, S, S], made of damaged ones; where layers learn one by one, by the first of them."""
        damaged = views.images[0]
        if self._layers:
            first = self._layers[0]
            maps = layers_of(self.backbone)[first](damaged)
            return {"images": self.decoders[first](maps, damaged.shape[-1])[None]}
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
        made = at_least_float32(inputs["images"][0])
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
        """Errors, and that of what is made over the variance of pixels, that of the mean colour everywhere; of each
        layer that has learnt in the interval.
        """
        own = super().measures(loss, signs, num_images)
        for of in ("", *(f"{name}_" for name in self._layers[1:])):
            if f"{of}error" in signs:
                variance = variance_of(f"{of}pixel", signs)
                own |= {f"{of}unexplained": float(signs[f"{of}error"]) / variance, f"{of}pixel_variance": variance}
        return own

    @classmethod
    def complaints(cls, config: Config, length: Length) -> list[str]:
        """Also whether each layer has its part of the run."""
        found, ours = super().complaints(config, length), _settings(config)
        if ours.layers == TOGETHER:
            return found
        count = len(layer_shapes(config.model, config.data.crops[0].size))
        if length.num_steps < count:
            found.append(f"method.layers={ours.layers}: {count} layers in {length.num_steps} steps; train longer")
        if config.optim.final_lr < config.optim.lr / 2:
            found.append(
                f"optim.final_lr={config.optim.final_lr:g}: with method.layers={ours.layers} the last layer learns at "
                f"the end of the run alone; set optim.final_lr={config.optim.lr:g}"
            )
        return found

    @classmethod
    def brief(cls, row: Row) -> str:
        """What of the variance is not in the images made."""
        return said_missing(row)

    @classmethod
    def symptoms(cls, config: Config) -> list[Symptom]:
        """That the images made are no better than the mean colour everywhere."""
        together = _settings(config).layers == TOGETHER
        return [
            nothing_made(
                "images are not restored" if together else "a layer does not restore its input",
                of="pixels" if together else "what it takes",
                where="the images made" if together else "what it restores",
                maker="the decoder" if together else "its decoder",
                remedy=f"Try, in another run.dir, optim.lr={config.optim.lr / 3:.2g} or {3 * config.optim.lr:.2g}, or "
                f"method.masked={_settings(config).masked / 2:.2g}",
                by_rate=together,  # the sign of a layer that never learns comes after those of layers that did
            )
        ]

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """Errors of what is made and of what it is made of."""
        curves = {"of images made": "error", "of damaged images": "input_error", "of the mean colour": "pixel_variance"}
        errors = Panel("Mean square of what is wrong", curves)
        if _settings(config).layers == TOGETHER:
            return [errors]
        first, *others = layer_shapes(config.model, config.data.crops[0].size)
        missing = {first: "unexplained"} | {name: f"{name}_unexplained" for name in others}
        return [errors, Panel("Share of the variance that is missing in what a layer restores", missing)]


def _settings(config: Config) -> Settings:
    assert isinstance(config.method, Settings)
    return config.method
