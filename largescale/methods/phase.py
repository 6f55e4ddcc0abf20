"""What a method is given in an offline phase: what it makes of every image of the corpus, each seen once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from largescale.clustering.fixed_point import mean_of_rows
from largescale.config import Config
from largescale.processes import rank, world_size

_SHOWN = 7 / 8
"""Side of a centre crop over the shorter side of the image: the published 224 of 256."""
_ROWS = 4096
"""That are centred together."""


class PlainEmbeddings(NamedTuple):
    """Of this rank's range of ids; ranks have all ranges.

    Attributes:
        vectors: what `Method.plain` makes of each image that could be read, in the order of ids, [m, D]; where
            `Method.phase_sums` says so, their sum [1, D].
        readable: which of the images those are, bool [n].
    """

    vectors: Tensor
    readable: Tensor


def no_embeddings() -> PlainEmbeddings:
    """For a phase that wants none."""
    return PlainEmbeddings(torch.empty(0, 0), torch.empty(0, dtype=torch.bool))


def centred(corpus: PlainEmbeddings) -> Iterator[tuple[Tensor, Tensor]]:
    """Unit vectors whose mean over all images of all ranks was subtracted before, for a first bank.

    While BatchNorm's running statistics mean nothing yet, all embeddings share one direction, and without it they would
    nearly be one vector.

    Yields:
        Places in this rank's range of ids, and the rows [n, D] for them; where all embeddings are equal, as they were.

    Collectives: those of `mean_of_rows`.
    """
    mean, places = mean_of_rows(corpus.vectors), corpus.readable.nonzero()[:, 0]
    for rows, theirs in zip(corpus.vectors.split(_ROWS), places.split(_ROWS), strict=True):
        whole = pad(rows.double(), (0, 0, 0, _ROWS - len(rows)))  # of one shape: rounded alike on all ranks
        found = normalize(whole - mean, dim=1)[: len(rows)].to(rows.dtype)
        yield theirs, torch.where(found.any(1, keepdim=True), found, rows)


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
