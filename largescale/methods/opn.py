"""Order prediction network: in which order do four frames of a clip come? (Lee et al., arXiv 1708.01246)

The naive loop::

    for i in clips:
        frames = four frames of i in ascending time, where things move
        order = one of the 24 permutations
        z = [embedding(backbone(one channel of a shifted crop of frames[j])) for j in order]
        pairs = [pair(concatenated z[p], z[q]) for p in 0 .. 3 for q in p + 1 .. 3]
        loss += -log softmax(head(concatenated pairs))[class of order] / B

An order and its reverse, the last frame shown first, are one class, as published: there are 12. Of motion that looks
the same when time runs backwards at most two thirds of the answers can be right, since that swaps eight classes in
pairs.

Departures from the published code: a crop at random, the same for all frames, instead of the window with the most
motion; motion is the change of luma that the index has of each frame, not optical flow; one layer for all pairs;
neighbours in time are as far apart as those of Shuffle and Learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, permutations

import torch
from torch import Tensor, nn

from largescale.config import Config, WantedFrames, require
from largescale.config.setting import setting
from largescale.data.length import Length
from largescale.data.task_views.frames import drawn_numbers, reordered, shifted_crops, split_channels
from largescale.data.views import Views
from largescale.methods.choice import Choice
from largescale.methods.embedding_method import Named
from largescale.methods.frame_task import FrameSettings, FrameTask, settings_of
from largescale.models.heads import hidden_widths
from largescale.models.plain_networks import least_side

_FRAMES = 4
ORDERS = sorted(permutations(range(_FRAMES)), key=lambda order: (min(order, order[::-1]), order))
"""All orders, each beside its reverse: the class of the n-th is n // 2."""
PAIRS = list(combinations(range(_FRAMES), 2))


@dataclass
class Settings(FrameSettings):
    """The order prediction network's keys under `method`."""

    embedding: list[int] = hidden_widths((1024,), of="the layers that each frame goes through", min_length=1)
    pair: int = setting(512, "Width of what two frames make together.", at_least=1, at_most=2**24)
    jitter: int = setting(
        5,
        "Most pixels that each frame is displaced by, both ways; the network sees as much less of every side "
        "(arXiv 1708.01246).",
        at_least=0,
        at_most=2**10,
    )
    channel_splitting: bool = setting(
        True,
        "The network sees one channel of each frame, drawn at random, in the place of all three, since colours would "
        "tell what belongs together (arXiv 1708.01246).",
    )

    def frame_tuples(self) -> WantedFrames:
        """Four, in ascending time."""
        return WantedFrames(_FRAMES, (tuple(range(_FRAMES)),), (1.0,), self.frames)

    def check(self, config: Config) -> None:
        """Something is left of views."""
        model, size = config.model, config.data.crops[0].size
        least = least_side(model.backbone, model.stem)
        require(
            size - 2 * self.jitter >= least,
            "method.jitter",
            self.jitter,
            f"at most {max(0, (size - least) // 2)}: views of data.crops.0 have {size} px, the network needs {least}",
        )


class OPN(FrameTask):
    """Backbone, embedding of frames, a layer on pairs of them, and a head over all pairs."""

    title = "Order prediction network (OPN)"
    reference = "pretext/opn"
    largest_view = 90
    Settings = Settings

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        settings, self._seed = _settings(config), config.run.seed
        self._jitter, self._splits = settings.jitter, settings.channel_splitting
        self.pair = nn.Sequential(
            nn.Linear(2 * settings.embedding[-1], settings.pair, bias=False),
            nn.BatchNorm1d(settings.pair),
            nn.ReLU(inplace=True),
        )
        self.head = nn.Linear(len(PAIRS) * settings.pair, len(ORDERS) // 2)

    @classmethod
    def num_classes(cls, config: Config) -> int:
        """Orders, of which a reversed one is the same."""
        return len(ORDERS) // 2

    @classmethod
    def missing(cls, config: Config) -> str:
        """A single channel of each frame, and another place of each."""
        settings = _settings(config)
        if not settings.channel_splitting:
            return "Set method.channel_splitting=true in another run.dir"
        return "" if settings.jitter else "Raise method.jitter in another run.dir, so that frames are displaced"

    @classmethod
    def suited(cls, config: Config, length: Length) -> dict[str, Choice]:
        """A displacement in proportion to views."""
        side = config.data.crops[0].size
        return {"jitter": Choice(max(1, side // 18), f"of views of {side} px, as 5 of 90 px published")}

    def task_views(self, views: Views, step: int) -> Views:
        """Frames in any order, displaced, one channel of each; `orders`, int64 [1, B], says which class it is."""
        ids, seed = views.ids, self._seed
        number = drawn_numbers(ids, len(ORDERS), seed=seed, step=step)
        views = reordered(views, torch.tensor(ORDERS, device=ids.device)[number])
        frames = shifted_crops(views.images[0], ids, self._jitter, seed=seed, step=step)
        if self._splits:
            frames = split_channels(frames, ids, seed=seed, step=step)
        frames = frames.contiguous(memory_format=torch.channels_last)
        return views._replace(images=[frames], facts={**views.facts, "orders": (number // 2)[None]})

    def embed(self, views: Views) -> Named:
        """`logits` [1, B, 12] of orders."""
        z = self.embedded(views)
        pairs = torch.stack([torch.cat([z[:, one], z[:, two]], dim=1) for one, two in PAIRS], dim=1)
        made: Tensor = self.pair(pairs.flatten(0, 1)).unflatten(0, (len(z), -1))
        return {"logits": self.head(made.flatten(1))[None]}

    def targets(self, views: Views) -> Named:
        """`wanted`, the orders, int64 [1, B]."""
        return {"wanted": views.facts["orders"]}


def _settings(config: Config) -> Settings:
    settings = settings_of(config)
    assert isinstance(settings, Settings)
    return settings
