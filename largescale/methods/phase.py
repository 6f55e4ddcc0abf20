"""What a method is given in an offline phase: what it makes of every image of the corpus, each seen once."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from largescale.config import Config
from largescale.processes import rank, world_size

_SHOWN = 7 / 8
"""Side of a centre crop over the shorter side of the image: the published 224 of 256."""


class PlainEmbeddings(NamedTuple):
    """Of this rank's range of ids; ranks have all ranges.

    Attributes:
        vectors: what `Method.plain` makes of each image that could be read, in the order of ids, [m, D].
        readable: which of the images those are, bool [n].
    """

    vectors: Tensor
    readable: Tensor


def no_embeddings() -> PlainEmbeddings:
    """For a phase that wants none."""
    return PlainEmbeddings(torch.empty(0, 0), torch.empty(0, dtype=torch.bool))


def with_plain_images(config: Config) -> Config:
    """The configuration whose `evaluate.resize` and `evaluate.size` are those of the images that a phase sees, whatever
    evaluation is to see: of the size of a large view, and as much of an image as the published crop shows, unless
    large views never show as little or as much.
    """
    large = config.data.crops[0]
    least, most = (math.sqrt(share) for share in large.scale)
    resize = round(large.size / min(max(_SHOWN, least), most))
    return replace(config, evaluate=replace(config.evaluate, size=large.size, resize=resize))


def own_ids(num_samples: int) -> range:
    """This rank's range of ids: `ceil(N / ranks)` of them, as DTensor's `Shard(0)` cuts; fewer on the last ranks."""
    piece = -(-num_samples // world_size())
    first = min(rank() * piece, num_samples)
    return range(first, min(first + piece, num_samples))
