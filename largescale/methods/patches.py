"""Relative patch location: in which of eight directions one tile of an image lies from another (arXiv 1505.05192,
section 3).

The naive loop::

    for i in images:
        tiles = one of each of 3 x 3 cells of i, at a random place in it, with a gap between
        z = [embedding(backbone(tile)) for tile in tiles]       # each by itself
        for direction, other in enumerate the 8 tiles around the centre:
            loss += -log softmax(head(concatenated z[centre], z[other]))[direction] / 8 / B

Departures from the published code: all eight pairs of an image are asked in a step, so that every tile is embedded
once; the grid stands in a crop of the image, not anywhere on one of several sizes; tiles are normalised one by one;
none of them is shrunk and enlarged again. A backbone trained so sees a channel and two of faint noise, while whole
images are evaluated as they are, by BatchNorm's running statistics of tiles, as there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from largescale.config import Config
from largescale.data.views import Views
from largescale.methods.embedding_method import Named
from largescale.methods.pictures import Pictures, in_range, laid_out
from largescale.methods.tile_task import (
    SINGLE_CHANNEL,
    Proportions,
    TileSettings,
    TileTask,
    aberration_cure,
    least_gap,
    settings_of,
    tile_side,
)
from largescale.models.heads import hidden_widths, projection_head

_CELLS, _CENTRE, _DIRECTIONS = 3, 4, 8


@dataclass
class Settings(TileSettings):
    """Relative patch location's keys under `method`."""

    tile: int = tile_side(96)
    gap: int = least_gap(34)
    aberration: str = aberration_cure(SINGLE_CHANNEL)
    hidden: list[int] = hidden_widths((4096,), of="the head on a pair of tiles")

    def cells_along_side(self) -> int:
        """Three: a centre and what is around it."""
        return _CELLS


class Patches(TileTask):
    """Backbone, embedding of tiles, and a head over pairs of them."""

    title = "Relative patch location"
    reference = "pretext/patches"
    Settings = Settings
    pictures = Pictures(
        "Tiles where they are told to be",
        "Tiles of images as they are before each is normalised, and around the one in the centre the others where the "
        "network takes them to be: of several in one place the one it is surest of, and nothing where it sees none.",
        ("tiles", "as told", "image"),
    )
    published = Proportions(tile=96, gap=34, channel_shift=0, cell=144)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        settings = settings_of(config)
        assert isinstance(settings, Settings)
        self.head = projection_head(2 * settings.embedding, settings.hidden, _DIRECTIONS, batchnorm=True)

    @classmethod
    def num_classes(cls, config: Config) -> int:
        """Directions."""
        return _DIRECTIONS

    def task_views(self, views: Views, step: int) -> Views:
        """Tiles in reading order."""
        order = torch.arange(_CELLS**2, device=views.ids.device).expand(len(views.ids), -1)
        return views._replace(images=[self.cut(views, order, step)])

    def draw(self, views: Views) -> list[Tensor]:
        """Tiles in their places, in those that are told, and the images that they are of."""
        [images] = views.images
        seen = self.task_views(views, 0)
        order = torch.arange(_CELLS**2, device=images.device)
        tiles = in_range(self.tiles(views, order.expand(len(images), -1), 0), self._run).unflatten(0, (len(images), -1))
        answers = self.embed(seen)["logits"][0].log_softmax(2)
        told = answers == answers.amax(2, keepdim=True)
        surest, tile = answers.masked_fill(~told, -torch.inf).max(1)  # of each direction
        around = order[order != _CENTRE]
        found = tiles[torch.arange(len(tiles), device=tiles.device)[:, None], around[tile]]
        placed = tiles.clone()
        placed[:, around] = torch.where((surest > -torch.inf)[..., None, None, None], found, 1.0)
        return [laid_out(tiles), laid_out(placed), in_range(images, self._run)]

    def embed(self, views: Views) -> Named:
        """`logits` [1, B, 8, 8] of directions, for each neighbour of the centre."""
        z = self.embedded(views)
        others = torch.cat([z[:, :_CENTRE], z[:, _CENTRE + 1 :]], dim=1)
        pairs = torch.cat([z[:, _CENTRE : _CENTRE + 1].expand_as(others), others], dim=2)
        return {"logits": self.head(pairs.flatten(0, 1)).unflatten(0, (1, len(z), _DIRECTIONS))}

    def targets(self, views: Views) -> Named:
        """`wanted`, the directions, int64 [1, B, 8]."""
        directions = torch.arange(_DIRECTIONS, device=views.ids.device)
        return {"wanted": directions.expand(1, len(views.ids), -1)}
