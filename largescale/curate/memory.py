"""How much memory a rank needs for a curation, stage by stage, and what to do where there is less."""

from __future__ import annotations

from largescale.clustering import kmeans
from largescale.curate import duplicates
from largescale.curate.buckets import groups_of_files
from largescale.curate.embeddings import Embeddings
from largescale.curate.wish import Wish
from shards.ground.errors import InputError

_OF_AN_IMAGE, _OF_A_DRAW = 64, 80
"""Bytes of an image in the result, and of a point from which a start is drawn."""
_SKEW = 4
"""How many times as large as the mean the largest coarse cluster is taken to be, before it is known."""


def stages(embeddings: Embeddings, wish: Wish, ranks: int) -> dict[str, tuple[int, str]]:
    """Bytes of a rank at the peak of each stage, and what makes them fewer."""
    num, width, coarse = embeddings.num_images, embeddings.width, wish.num_coarse(embeddings.num_images)
    sampled = -(-wish.num_sampled(num) // ranks)
    rows = max(sum(file.num_images for file in group) for group in groups_of_files(embeddings))
    found = {
        "coarse clusters": (
            clustering_bytes(sampled, coarse, width),
            "use more ranks, or fewer clusters with --coarse",
        ),
        "sorting": (
            rows * width * embeddings.dtype.itemsize * 2 + kmeans.working_bytes(8192, coarse, width, 4),
            "write features of smaller shards, or with --dim",
        ),
        "the largest coarse cluster": (
            bucket_bytes(min(num, _SKEW * -(-num // coarse)), wish, coarse, width),
            "use more clusters with --coarse, or features with --dim",
        ),
        "the result": (-(-num // ranks) * _OF_AN_IMAGE, "use more ranks"),
    }
    for level, (below, count) in enumerate(zip(wish.levels, wish.levels[1:], strict=False), 2):
        found[f"level {level}"] = (
            clustering_bytes(-(-below // ranks), count, width) + 40 * below,
            "use more ranks, smaller --levels, or features with --dim",
        )
    return found


def clustering_bytes(points: int, count: int, width: int) -> int:
    """Of k-means of so many points on this rank, with the points and what is resampled of them."""
    return points * (2 * 4 * width + _OF_A_DRAW) + kmeans.working_bytes(points, count, width, 4)


def bucket_bytes(images: int, wish: Wish, coarse: int, width: int) -> int:
    """Of duplicates and clusters in a coarse cluster of so many images."""
    found = duplicates.working_bytes(images, width)
    if wish.levels:
        count = min(images, -(-wish.levels[0] // coarse))
        found = max(found, 4 * images * width + clustering_bytes(images, count, width))
    return found


def most(found: dict[str, tuple[int, str]]) -> tuple[str, int]:
    """The stage that needs most, and its bytes."""
    name = max(found, key=lambda one: found[one][0])
    return name, found[name][0]


def check(found: dict[str, tuple[int, str]], limit: float) -> None:
    """Refuse a stage that needs more than the limit, in bytes.

    Raises:
        InputError: says which, and what makes it less.
    """
    name, size = most(found)
    remedy = found[name][1]
    if size > limit:
        raise InputError(
            f"{name}: needs {size / 1e9:,.2f} GB on each rank, and {limit / 1e9:,.2f} GB are allowed; {remedy}, or "
            f"allow more with --memory-gb"
        )
