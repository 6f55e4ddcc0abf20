"""Contrastive predictive coding of images: what the rows above make of an image must tell which patches come further
down, among all patches of the batch (arXiv 1807.03748, sections 2 and 3.2).

Of an image, z[t, u] is the embedding of the patch in row t and column u of a grid whose cells overlap, and c[t, u] what
convolutions that see no lower rows make of all of them. The naive loop::

    for i in images:
        for k in first .. rows:                                 # rows ahead; nearer ones overlap what is known
            for t, u in places of the grid with t + k inside:
                guess = W[k] @ c[i, t, u]
                every = [exp(guess @ z[j, s, v]) for j in images for s, v in places]
                loss += -log(exp(guess @ z[i, t + k, u]) / sum(every))
    loss /= number of guesses

Candidates are all patches of all ranks, the right one among them once. Departures from the published code: layer
normalisation (`model.norm=layer`) in the place of none, as in arXiv 1905.09272, section 3, since BatchNorm's statistics
tell patches about each other;
patches are not padded; the backbone is used whole and pooled, not up to its third stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, relu

from largescale.config import Config, require
from largescale.config.schema import MethodConfig
from largescale.config.setting import setting
from largescale.data.length import Length
from largescale.data.task_views.tiles import Windows, overlapping_tiles
from largescale.data.views import Views
from largescale.distributed.collectives import gather_rows
from largescale.methods.choice import Choice
from largescale.methods.contrastive import images_of_loss
from largescale.methods.embedding_method import SPANS, Named
from largescale.methods.method import Output
from largescale.methods.pictures import Pictures, in_range, laid_out
from largescale.methods.pretext_task import PretextTask
from largescale.methods.tile_task import require_visible
from largescale.models.backbones import build_backbone
from largescale.models.heads import HeadConv2d
from largescale.processes import rank


@dataclass
class Settings(MethodConfig):
    """Contrastive predictive coding's keys under `method`."""

    loss_spans: ClassVar[tuple[str, ...]] = SPANS

    window: int = setting(64, "Side in pixels of the cells of the grid.", at_least=1, at_most=2**20)
    stride: int = setting(32, "Pixels from one cell to the next.", at_least=1, at_most=2**20)
    tile: int = setting(60, "Side in pixels of a patch, at a random place in its cell.", at_least=1, at_most=2**20)
    rows: int = setting(
        5, "Rows ahead that are told at most; those that overlap with what is known are not.", at_least=1, at_most=2**10
    )
    embedding: int = setting(1024, "Width of embeddings of patches.", at_least=1, at_most=2**24)
    context_layers: int = setting(
        5, "Convolutions over embeddings of this row and the one above.", at_least=1, at_most=2**10
    )

    def windows(self) -> Windows:
        """The grid."""
        return Windows(self.window, self.stride, self.tile)

    def first(self) -> int:
        """Rows ahead of the nearest one that does not overlap."""
        return -(-self.window // self.stride)

    def check(self, config: Config) -> None:
        """One view, with enough rows."""
        nums = [group.num for group in config.data.crops]
        require(nums == [1], "data.crops", nums, "one group of one view, such as [{num: 1, size: 256}]")
        require(self.tile <= self.window, "method.tile", self.tile, f"at most method.window, {self.window}")
        require_visible(config, "method.tile", self.tile)
        require(self.rows >= self.first(), "method.rows", self.rows, f"at least {self.first()}: nearer rows overlap")
        side = config.data.crops[0].size
        along = self.windows().along(side)
        require(along > self.rows, "method.rows", self.rows, f"less than {along}, the rows of views of {side} px")


class RowsAbove(nn.Module):
    """Maps [B, D, g, g] to maps of the same shape, in which no place knows lower rows."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HeadConv2d(width, width, (2, 3)) for _ in range(layers))

    def forward(self, maps: Tensor) -> Tensor:
        """Residual convolutions of each row and the one above."""
        for layer in self.layers:
            maps = maps + layer(pad(relu(maps), (1, 1, 1, 0)))
        return maps


class CPC(PretextTask):
    """Backbone, embeddings of patches, context of the rows above, and guesses of rows below."""

    title = "CPC"
    reference = "pretext/cpc"
    Settings = Settings
    spoilers = MappingProxyType({"erase": "a rectangle over several patches tells which belong together"})
    pictures = Pictures(
        "Patches guessed from above",
        "Patches of images, and in the place of each that has rows above it the one, of all patches of these images, "
        "that fits the guess from the nearest of those rows which does not overlap.",
        ("patches", "guessed", "image"),
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        settings = self.config = _settings(config)
        self._run = config
        self._seed, self._along = config.run.seed, settings.windows().along(config.data.crops[0].size)
        self.backbone, self.num_features = build_backbone(config.model)
        self.embedding = nn.Linear(self.num_features, settings.embedding)
        self.context = RowsAbove(settings.embedding, settings.context_layers)
        self.ahead = range(settings.first(), settings.rows + 1)
        self.guesses = nn.Linear(settings.embedding, len(self.ahead) * settings.embedding, bias=False)

    @classmethod
    def num_classes(cls, config: Config) -> int:
        """Patches to choose from."""
        return images_of_loss(config) * _settings(config).windows().along(config.data.crops[0].size) ** 2

    def task_views(self, views: Views, step: int) -> Views:
        """Patches [B * g * g, 3, tile, tile]."""
        [images] = views.images
        tiles = overlapping_tiles(images, views.ids, self.config.windows(), seed=self._seed, step=step)
        return views._replace(images=[tiles.contiguous(memory_format=torch.channels_last)])

    def draw(self, views: Views) -> list[Tensor]:
        """Patches, those that are guessed in their places, and the images that they are of."""
        seen, grid, rows = self.task_views(views, 0), (self._along, self._along), self.ahead[0]
        patches = in_range(seen.images[0], self._run).unflatten(0, (-1, *grid))
        found = self.embed(seen)
        scores = found["guesses"][0][:, :-rows] @ found["patches"].flatten(0, 3).T
        guessed = patches.clone()
        guessed[:, rows:] = patches.flatten(0, 2)[scores.argmax(-1)]
        return [*(laid_out(one.flatten(1, 2)) for one in (patches, guessed)), in_range(views.images[0], self._run)]

    def embed(self, views: Views) -> Named:
        """`patches` [1, B, g, g, D], and `guesses` [K, B, g, g, D] of those k rows below each place."""
        along = self._along
        patches = self.embedding(self.backbone(views.images[0])).unflatten(0, (-1, along, along))
        context = self.context(patches.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        guesses = self.guesses(context).unflatten(3, (len(self.ahead), -1)).movedim(3, 0)
        return {"patches": patches[None], "guesses": guesses}

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The mean over all guesses of images and rows.

        Collectives: those of `gather_rows`, once.
        """
        patches, guesses = inputs["patches"][0], inputs["guesses"]
        precision = torch.promote_types(patches.dtype, torch.float32)
        with torch.autocast(patches.device.type, enabled=False):
            candidates = gather_rows(patches.to(precision)).flatten(0, 2)
            places = torch.arange(patches[..., 0].numel(), device=patches.device).view(patches.shape[:3])
            places = places + rank() * places.numel()
            losses, right, count = [], [], 0
            for rows, own in zip(self.ahead, guesses, strict=True):
                wanted = places[:, rows:].flatten()
                logits = own[:, :-rows].flatten(0, 2).to(precision) @ candidates.T
                losses.append(cross_entropy(logits, wanted, reduction="sum"))
                right.append((logits.detach().argmax(1) == wanted).sum())
                count += len(wanted)
        loss = torch.stack(losses).sum() / count
        return Output(loss, {"task_accuracy": torch.stack(right).sum().to(precision) / count}, {})

    @classmethod
    def missing(cls, config: Config) -> str:
        """Normalisation without a batch."""
        return "" if config.model.norm == "layer" else "Set model.norm=layer in another run.dir"

    @classmethod
    def suited(cls, config: Config, length: Length) -> dict[str, Choice]:
        """A grid of seven rows."""
        side = config.data.crops[0].size
        stride = side // 8
        why = f"of views of {side} px, as 64, 32 and 60 of 256 px published"
        return {
            "window": Choice(2 * stride, why),
            "stride": Choice(stride, why),
            "tile": Choice(max(1, 2 * stride * 15 // 16), why),
            "rows": Choice(5, "of seven; the next one overlaps"),
        }


def _settings(config: Config) -> Settings:
    assert isinstance(config.method, Settings)
    return config.method
