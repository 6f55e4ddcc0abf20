"""Jigsaw: which of a set of permutations the tiles of an image were put in (arXiv 1603.09246, section 3).

The naive loop::

    orders = P permutations that differ in many places          # the same ones in every run
    for i in images:
        k = one of P at random
        tiles = one of each cell of i, at a random place in it, of mean 0 and deviation 1, put in orders[k]
        z = [embedding(backbone(tile)) for tile in tiles]       # each by itself
        loss += -log softmax(head(concatenated z))[k] / B

Departures from the published code: the set of permutations has the largest least distance that is known or found, where
published sets maximise a mean (`largescale/data/task_views/permutations.py`); BatchNorm in the heads; photometric
changes are those of the view, not of each tile. BatchNorm's running statistics, by which whole images are evaluated,
are those of tiles, as there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from largescale.config import Config, require
from largescale.config.setting import setting
from largescale.data.task_views.permutations import drawn_orders, permutation_set
from largescale.data.views import Views
from largescale.methods.embedding_method import Named
from largescale.methods.pictures import Pictures, in_range, laid_out
from largescale.methods.tile_task import Proportions, TileSettings, TileTask, most_channel_shift, settings_of
from largescale.models.heads import hidden_widths, projection_head


@dataclass
class Settings(TileSettings):
    """Jigsaw's keys under `method`."""

    channel_shift: int = most_channel_shift(2)
    cells: int = setting(3, "Cells along a side of the view, each of which gives a tile.", at_least=2, at_most=3)
    permutations: int = setting(
        100,
        "Permutations to tell from each other; up to 72 of nine tiles differ in 8 places, 100 in 6, 1000 in 5.",
        at_least=2,
        at_most=math.factorial(9),
    )
    hidden: list[int] = hidden_widths((), of="the head on all tiles")

    def cells_along_side(self) -> int:
        """Cells along a side."""
        return self.cells

    def check(self, config: Config) -> None:
        """There are as many permutations."""
        super().check(config)
        most = math.factorial(self.cells**2)
        require(self.permutations <= most, "method.permutations", self.permutations, f"at most {most}")


class Jigsaw(TileTask):
    """Backbone, embedding of tiles, and a head over all tiles of an image.

    Attributes:
        orders: the permutations, int64 [P, T]; in no checkpoint, since they never change.
    """

    orders: Tensor
    title = "Jigsaw"
    reference = "pretext/jigsaw"
    Settings = Settings
    pictures = Pictures(
        "Tiles put back",
        "Tiles of images in a random order, as they are before each is normalised, and put back in the order that the "
        "network takes for the right one.",
        ("shuffled", "put back", "image"),
    )
    published = Proportions(tile=64, gap=0, channel_shift=2, cell=85)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        settings = _settings(config)
        self._places = settings.cells**2
        self.register_buffer("orders", self._orders(settings.permutations), persistent=False)
        width = self._places * settings.embedding
        self.head = projection_head(width, settings.hidden, settings.permutations, batchnorm=True)

    def _orders(self, count: int) -> Tensor:
        # On the host even where modules are built without memory: weights are put into those, but not these.
        return torch.tensor(permutation_set(count, self._places), device="cpu")

    @torch.no_grad()
    def finish_initialisation(self) -> None:
        """Put the permutations back where memory was allocated anew."""
        self.orders.copy_(self._orders(len(self.orders)))

    @classmethod
    def num_classes(cls, config: Config) -> int:
        """Permutations."""
        return _settings(config).permutations

    def task_views(self, views: Views, step: int) -> Views:
        """Tiles in a random order, and as a fact which one it is, int64 [B]."""
        number, order = drawn_orders(views.ids, self.orders, seed=self._seed, step=step)
        return views._replace(images=[self.cut(views, order, step)], facts={"permutation": number})

    def draw(self, views: Views) -> list[Tensor]:
        """Tiles as they are shown, in the order that is told, and the images that they are of."""
        _, order = drawn_orders(views.ids, self.orders, seed=self._seed, step=0)
        tiles = self.tiles(views, order, 0).unflatten(0, (len(views.ids), -1))
        told = self.embed(self.task_views(views, 0))["logits"][0].argmax(1)
        back = tiles[torch.arange(len(tiles), device=tiles.device)[:, None], self.orders[told].argsort(1)]
        shown, put_back = (
            laid_out(in_range(one.flatten(0, 1), self._run).unflatten(0, one.shape[:2])) for one in (tiles, back)
        )
        return [shown, put_back, in_range(views.images[0], self._run)]

    def embed(self, views: Views) -> Named:
        """`logits` [1, B, P] of permutations."""
        return {"logits": self.head(self.embedded(views).flatten(1))[None]}

    def targets(self, views: Views) -> Named:
        """`wanted`, the permutations, int64 [1, B]."""
        return {"wanted": views.facts["permutation"][None]}


def _settings(config: Config) -> Settings:
    settings = settings_of(config)
    assert isinstance(settings, Settings)
    return settings
