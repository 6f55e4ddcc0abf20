"""Shared by pretext tasks on tiles of an image: how tiles are cut, what keeps shortcuts out of them, and how the
backbone sees them.

The backbone sees one tile at a time, so that no feature of it compares tiles; what stands on it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from largescale.config import Config, require
from largescale.config.schema import MethodConfig
from largescale.config.setting import setting
from largescale.data.length import Length
from largescale.data.task_views.shortcut_cures import normalised, single_channels, without_green_magenta
from largescale.data.task_views.tiles import Grid, jittered_tiles
from largescale.data.views import Views
from largescale.methods.choice import Choice
from largescale.methods.pretext_task import PretextTask
from largescale.models.backbones import build_backbone, require_cells
from largescale.models.plain_networks import least_side

NONE, SINGLE_CHANNEL, PROJECTION = "none", "single_channel", "projection"


def tile_side(default: int) -> Any:
    """The setting `tile`: a field of a dataclass."""
    return setting(default, "Side of a tile in pixels.", at_least=1, at_most=2**20)


def least_gap(default: int) -> Any:
    """The setting `gap`."""
    return setting(
        default,
        "Least distance between neighbouring tiles in pixels, so that no edge goes on from one to the next; a tile is "
        "at a random place in what the gap leaves of its cell (arXiv 1505.05192, section 3.1).",
        at_least=0,
        at_most=2**20,
    )


def most_channel_shift(default: int) -> Any:
    """The setting `channel_shift`."""
    return setting(
        default,
        "Most pixels that each colour channel of a tile is moved by at random, against what lenses do to colours "
        "(arXiv 1603.09246, section 3.3); of no use on grey images.",
        at_least=0,
        at_most=2**10,
    )


def aberration_cure(default: str) -> Any:
    """The setting `aberration`."""
    return setting(
        default,
        "What else keeps lens colours from telling where a tile was: `single_channel` keeps one at random and puts "
        "faint noise in the place of others, `projection` takes away what lies between green and magenta (both arXiv "
        "1505.05192, section 3.1).",
        one_of=(NONE, SINGLE_CHANNEL, PROJECTION),
    )


@dataclass
class TileSettings(MethodConfig):
    """Keys under `method` of tasks on tiles."""

    tile: int = tile_side(64)
    gap: int = least_gap(0)
    channel_shift: int = most_channel_shift(0)
    aberration: str = aberration_cure(NONE)
    tile_normalisation: bool = setting(
        True,
        "Every channel of every tile gets mean 0 and standard deviation 1, since neighbours share both (arXiv "
        "1603.09246, section 3.3).",
    )
    embedding: int = setting(1000, "Width of a tile's embedding.", at_least=1, at_most=2**24)

    def cells_along_side(self) -> int:
        """Cells along a side."""
        raise NotImplementedError

    def grid(self) -> Grid:
        """The cells, and what is taken of each."""
        return Grid(self.cells_along_side(), self.tile, self.gap, self.channel_shift)

    def check(self, config: Config) -> None:
        """One view, into whose cells tiles fit."""
        groups = config.data.crops
        require(
            [group.num for group in groups] == [1],
            "data.crops",
            [group.num for group in groups],
            "one group of one view, which tiles are cut from, such as [{num: 1, size: 255, scale: [0.4, 1.0]}]",
        )
        cell, grid = groups[0].size // self.cells_along_side(), self.grid()
        require(grid.least_cell() <= cell, *self._too_large_for(cell))
        require_visible(config, "method.tile", self.tile)

    def _too_large_for(self, cell: int) -> tuple[str, int, str]:
        """Of tiles that do not fit into cells of so many pixels: a key to change, its value, and what is expected."""
        around, shift = self.grid().least_cell() - self.tile, 2 * self.channel_shift
        has = f"cells of data.crops.0 have {cell} px"
        if around < cell:
            too = "method.gap and twice method.channel_shift must fit in too"
            return "method.tile", self.tile, f"at most {cell - around}: {has}, and {too}"
        if shift < cell:
            too = "a tile and twice method.channel_shift must fit in too"
            return "method.gap", self.gap, f"at most {cell - shift - 1}: {has}, and {too}"
        if cell > 0:
            return "method.channel_shift", self.channel_shift, f"at most {(cell - 1) // 2}: {has}"
        cells = self.cells_along_side()
        return "data.crops", cell, f"a size of at least {cells}, {cells} tiles along a side"


class Proportions(NamedTuple):
    """Of a recipe: tile, gap, shift of channels and side of a cell, in pixels."""

    tile: int
    gap: int
    channel_shift: int
    cell: int


class TileTask(PretextTask):
    """Backbone, and an embedding of every tile.

    Attributes:
        published: proportions of the published recipe.
    """

    published: ClassVar[Proportions]
    spoilers = MappingProxyType({"erase": "a rectangle over several tiles tells where they were"})

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config, self._run = settings_of(config), config
        self._seed, self._std = config.run.seed, config.data.std
        self.backbone, self.num_features = build_backbone(config.model)
        self.tile_head = nn.Sequential(
            nn.Linear(self.num_features, self.config.embedding, bias=False),
            nn.BatchNorm1d(self.config.embedding),
            nn.ReLU(inplace=True),
        )

    def cut(self, views: Views, order: Tensor, step: int) -> Tensor:
        """Tiles [B * T, 3, tile, tile] of the cells of an order [B, T], without what would tell where they were."""
        settings, tiles = self.config, self.tiles(views, order, step)
        if settings.tile_normalisation:
            tiles = normalised(tiles)
        if settings.aberration == SINGLE_CHANNEL:
            tiles = single_channels(tiles, views.ids, seed=self._seed, step=step)
        return tiles.contiguous(memory_format=torch.channels_last)

    def tiles(self, views: Views, order: Tensor, step: int) -> Tensor:
        """Tiles [B * T, 3, tile, tile] of the cells of an order [B, T], as normalised as images are."""
        [images] = views.images
        if self.config.aberration == PROJECTION:
            images = without_green_magenta(images, self._std)
        return jittered_tiles(images, views.ids, order, self.config.grid(), seed=self._seed, step=step)

    def embedded(self, views: Views) -> Tensor:
        """Embeddings of tiles, [B, T, D]."""
        return self.tile_head(self.backbone(views.images[0])).unflatten(0, (len(views.ids), -1))

    @classmethod
    def missing(cls, config: Config) -> str:
        """Normalised tiles, and room for them to move in."""
        settings, side = settings_of(config), config.data.crops[0].size
        if not settings.tile_normalisation:
            return "Set method.tile_normalisation=true in another run.dir"
        room = side // settings.cells_along_side() - settings.grid().least_cell()
        return "" if room else "Lower method.tile in another run.dir, so that tiles have room to move in their cells"

    @classmethod
    def suited(cls, config: Config, length: Length) -> dict[str, Choice]:
        """Tiles and gaps in the proportions of published ones."""
        whole, side = cls.published, config.data.crops[0].size // settings_of(config).cells_along_side()

        def scaled(pixels: int) -> Choice:
            return Choice(
                pixels * side // whole.cell, f"of cells of {side} px, as {pixels} of {whole.cell} px published"
            )

        return {"tile": scaled(whole.tile), "gap": scaled(whole.gap), "channel_shift": scaled(whole.channel_shift)}


def require_visible(config: Config, key: str, side: int) -> None:
    """Parts of images are large enough for the backbone.

    Args:
        config: with the backbone.
        key: of their side.
        side: in pixels.

    Raises:
        InputError: they are not.
    """
    model = config.model
    least = least_side(model.backbone, model.stem)
    require(side >= least, key, side, f"at least {least} with model.backbone={model.backbone} model.stem={model.stem}")
    require_cells(model, {key: side})


def settings_of(config: Config) -> TileSettings:
    """The keys under `method`."""
    assert isinstance(config.method, TileSettings)
    return config.method
