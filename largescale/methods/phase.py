"""What a method is given in an offline phase: what it makes of every image of the corpus, each seen once."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from largescale.processes import rank, world_size


class PlainEmbeddings(NamedTuple):
    """Of this rank's range of ids; ranks have all ranges.

    Attributes:
        vectors: what `Method.plain` makes of each image, resized and cropped at its centre, [n, D].
        readable: bool [n]; vectors of unreadable images are zero.
    """

    vectors: Tensor
    readable: Tensor


def own_ids(num_samples: int) -> range:
    """This rank's range of ids: `ceil(N / ranks)` of them, as DTensor's `Shard(0)` cuts; fewer on the last ranks."""
    piece = -(-num_samples // world_size())
    first = min(rank() * piece, num_samples)
    return range(first, min(first + piece, num_samples))
