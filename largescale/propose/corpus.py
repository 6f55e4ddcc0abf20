"""What a shard folder's images are like: the indexes tell their sizes and copies, a sample of the pixels their colours.

Of a folder with very many shards some are looked at, spread over all of it; how many images were looked at is part of
the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.nn.functional import avg_pool2d

from largescale.config import Config, DataConfig
from largescale.data.corpora import Corpus, open_corpora
from largescale.data.decode import decode
from largescale.data.frames import require_clips
from largescale.data.reader import SampleError, ShardReader
from largescale.data.sounds import require_sound
from shards.format.shard_index import ShardIndex
from shards.ground.errors import InputError

MOST_SHARDS = 200
"""Whose indexes are read; of a store, where whole shards have to come, `MOST_FETCHED`."""
MOST_FETCHED = 2

MOST_IMAGES, LEAST_IMAGES = 500, 64
"""Of which the pixels are looked at; large ones only until `MOST_PIXELS` have been, but at least the second number."""
MOST_PIXELS = 2e8

_GREY = 3
"""Largest difference of channels, of 255, in an image that is called grey: JPEG leaves some."""


_LOOKED_AT = 128
"""Pixels of the shorter side at which neighbours are compared, about; of smaller images fewer."""
_SAME = 2
"""Largest difference of channels, of 255, of pixels that have the same colour: JPEG and scaling leave some."""


class _Pixels(NamedTuple):
    """What decoding tells; as in `CorpusFacts`."""

    num_decoded: int
    num_broken: int
    grey: float
    flat: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class CorpusFacts:
    """What was seen.

    Attributes:
        num_samples: of the whole folder.
        num_indexed: of which sizes and copies are known.
        shorter: pixels along the shorter side: of a tenth of the images at most, of half, of nine tenths.
        aspect: longer over shorter side, of half of the images and of nine tenths.
        copies: share of images whose bytes are those of another one before them.
        num_decoded, num_broken: images whose pixels were looked at, and that could not be read.
        grey: share of these without colours.
        flat: share of the pixels of an image that have the colour of the one before them in their row; of half of the
            images at most. Photographs have few such pixels, drawings many.
        mean, std: of each channel, where white is 1; every image counts the same.
        num_classes: of which the images looked at have labels; None if it was not counted.
    """

    num_samples: int
    num_indexed: int
    shorter: tuple[int, ...]
    aspect: tuple[float, ...]
    copies: float
    num_decoded: int
    num_broken: int
    grey: float
    flat: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int | None = None


def look_at(location: str, following: Config | None = None) -> CorpusFacts:
    """Look at a shard folder, here or in a store.

    Args:
        location: of the folder.
        following: a recipe whose method is to be trained on it.

    Raises:
        InputError: no shard folder, none of the images looked at can be decoded, or the method needs clips or sound
            that are not there.
    """
    [corpus] = open_corpora(DataConfig(shards=location))
    if following is not None:
        if (sound := following.method.sounds()) is not None:
            require_sound([corpus], sound)
        require_clips(following, [corpus])
    indexes = _indexes(corpus)
    width, height, checksum, label = (
        np.concatenate([getattr(index, column) for index in indexes.values()])
        for column in ("width", "height", "checksum", "label")
    )
    if not len(width):
        raise InputError(f"{location}: no images in it")
    shorter, longer = np.minimum(width, height), np.maximum(width, height)
    aspect = longer / np.maximum(1, shorter)
    pixels = _pixels(corpus, _some(corpus, indexes), location)
    return CorpusFacts(
        corpus.manifest.num_samples,
        len(width),
        tuple(int(side) for side in np.quantile(shorter, [0.1, 0.5, 0.9], method="nearest")),
        tuple(float(value) for value in np.quantile(aspect, [0.5, 0.9])),
        1 - len(np.unique(checksum)) / len(checksum),
        *pixels,
        num_classes=len(np.unique(label[label >= 0])),
    )


def _indexes(corpus: Corpus) -> dict[int, ShardIndex]:
    """Indexes of shards spread over the folder, by the shards' numbers."""
    most = MOST_SHARDS if corpus.cache is None else MOST_FETCHED
    count = len(corpus.manifest.shards)
    shards = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()
    return {shard: corpus.index(shard) for shard in shards}


def _some(corpus: Corpus, indexes: dict[int, ShardIndex]) -> np.ndarray:
    """Ids of images of these shards in random order, the same at every call."""
    ids = np.concatenate([corpus.first_samples[shard] + np.arange(len(index)) for shard, index in indexes.items()])
    random = np.random.default_rng(0)
    return random.choice(ids, min(MOST_IMAGES, len(ids)), replace=False)


def _pixels(corpus: Corpus, ids: np.ndarray, location: str) -> _Pixels:
    """Decode these images, or until there are enough pixels."""
    reader, most = ShardReader([corpus]), DataConfig().max_pixels
    sums, squares, grey, seen, broken, pixels = np.zeros(3), np.zeros(3), 0, 0, 0, 0
    why, flat = "", list[float]()
    for sample_id in ids.tolist():
        if pixels > MOST_PIXELS and seen >= LEAST_IMAGES:
            break
        try:
            image = decode(reader.read(sample_id), max_pixels=most)
        except SampleError as error:
            broken, why = broken + 1, f"{reader.key(sample_id)}: {error}"
            continue
        mean, square, is_grey = _moments(image)
        sums, squares, grey = sums + mean, squares + square, grey + is_grey
        flat.append(_flat(image))
        seen, pixels = seen + 1, pixels + image[0].numel()
    if not seen:
        raise InputError(f"{location}: none of {broken} images can be decoded, such as {why}")
    mean = sums / seen
    std = np.sqrt(np.maximum(0, squares / seen - mean**2))
    middle = float(np.median(flat))
    return _Pixels(seen, broken, grey / seen, middle, tuple(mean.tolist()), tuple(std.tolist()))


def _flat(image: Tensor) -> float:
    """Share of pixels of an image [3, H, W], made smaller, that have the colour of the one before them in their row."""
    if factor := min(image.shape[1:]) // _LOOKED_AT:  # neighbours in a large photograph are alike
        image = avg_pool2d(image.float(), factor)
    rows = image.numpy().astype(np.int16)
    if rows.shape[2] < 2:
        return 0.0
    return float((np.abs(rows[:, :, 1:] - rows[:, :, :-1]).max(0) <= _SAME).mean())


def _moments(image: Tensor) -> tuple[np.ndarray, np.ndarray, bool]:
    """Mean and mean square of the channels of an image [3, H, W], and whether it is grey."""
    rows = image.flatten(1).numpy()
    counts = np.stack([np.bincount(channel, minlength=256) for channel in rows]) / rows.shape[1]
    levels = np.arange(256) / 255
    spread = np.maximum.reduce(rows) - np.minimum.reduce(rows)
    return counts @ levels, counts @ levels**2, bool(spread.max() <= _GREY)
