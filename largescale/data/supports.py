"""Support batches: labelled images that join every step, for methods that ask for them.

Which they are is a pure function of (labels, seed, step), in three lines:

1. the labels that may be used are those of a list, or a share of each class (`few_labels.py`);
2. step t takes `classes` of the classes by a permutation keyed with t, in ascending order;
3. of each it takes the first `images` of a permutation of the class's images keyed with t and the class, from the
   beginning again where the class has fewer.

They are laid out image after image, class within: place p shows the (p // classes)-th image of the step's class
p % classes. So micro-batches and ranks, which take equal pieces, see every class if they see any whole row; ranks and
workers change who reads an image, never which images form a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import xxhash

from largescale.config import Config, SupportConfig, corpus_settings
from largescale.data.batches import BatchMaker
from largescale.data.corpora import Corpus, read_subset
from largescale.data.few_labels import stratified_rows
from largescale.data.loaded import Batch
from largescale.data.order import rank_places
from largescale.data.random import hash_coordinates, permute
from largescale.data.reader import ShardReader
from largescale.data.views import Supports
from shards.format.manifest import read_manifest
from shards.format.shard_index import read_index
from shards.ground.errors import InputError
from shards.stores.store import is_url

_AND = " and "
"""Between both parts of the fingerprint of a run with supports."""

_CLASSES, _IMAGES, _VIEWS = 21, 22, 23
"""Purposes of random numbers."""


class LabelledImages:
    """The images whose labels may be used, class by class.

    Args:
        ids: sample numbers in their folder, int64 [N].
        labels: their class numbers, int64 [N].

    Attributes:
        classes: numbers of the classes that have any, ascending, int64 [C].
    """

    def __init__(self, ids: np.ndarray, labels: np.ndarray) -> None:
        by_class = np.lexsort((ids, labels))
        self.ids = ids[by_class]
        self.classes, self.first, self.sizes = np.unique(labels[by_class], return_index=True, return_counts=True)

    def of_class(self, place: int) -> np.ndarray:
        """The images of `classes[place]`, ascending."""
        return self.ids[self.first[place] : self.first[place] + self.sizes[place]]

    def beside(self, sample_id: int) -> np.ndarray:
        """The other images of an image's class, ascending from there on, then from the first."""
        row = int(np.flatnonzero(self.ids == sample_id)[0])
        place = int(np.searchsorted(self.first, row, side="right")) - 1
        return np.roll(self.of_class(place), int(self.first[place]) - row)[1:]


class SupportOrder:
    """Which labelled images form which step, at which place.

    Args:
        labelled: to choose from.
        seed: the run's.
        classes, images: of `SupportConfig`.
    """

    def __init__(self, labelled: LabelledImages, *, seed: int, classes: int, images: int) -> None:
        self.labelled, self.seed, self.num_classes, self.num_images = labelled, seed, classes, images

    def classes_at(self, steps: np.ndarray) -> np.ndarray:
        """Places in `labelled.classes` of the classes of some steps [N], ascending: int64 [N, classes]."""
        keys = hash_coordinates(self.seed, _CLASSES, steps)[:, None]
        return np.sort(permute(np.arange(self.num_classes)[None], len(self.labelled.classes), keys), axis=1)

    def samples(self, steps: int | np.ndarray, places: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers at some places of the support batches of some steps, broadcast against each other, and a
        number for each draw, in the place of an epoch: so an image is augmented in another way each time.
        """
        size = self.num_classes * self.num_images
        steps, places = np.broadcast_arrays(steps, np.arange(size) if places is None else places)
        known, which = np.unique(steps, return_inverse=True)
        number, slot = np.divmod(places, self.num_classes)
        place = self.classes_at(known)[which.reshape(steps.shape), slot]
        sizes = self.labelled.sizes[place]
        shuffled = permute(number % sizes, sizes, hash_coordinates(self.seed, _IMAGES, steps, place))
        return self.labelled.ids[self.labelled.first[place] + shuffled], steps * self.num_images + number


class LabelledReader(ShardReader):
    """Reads labelled images; one that cannot be read is replaced by the next ones of its class that are in use."""

    def __init__(self, corpus: Corpus, labelled: LabelledImages) -> None:
        super().__init__([corpus])
        self._labelled = labelled

    def candidates(self, sample_id: int) -> Iterator[int]:
        """An image, and those of its class that stand in for it, one after the other; none of a shard that is lost."""
        yield sample_id
        beside = self._labelled.beside(sample_id).tolist()
        yield from (other for other in beside if not self._is_lost(self.locate(other)[0]))


class SupportBatches:
    """Makes this rank's part of the support batch of any step.

    Attributes:
        batches: makes the images.
        corpus: the folder that they are in.
        fingerprint: identifies the labels that may be used.
    """

    def __init__(
        self,
        config: Config,
        wanted: SupportConfig,
        corpus: Corpus,
        labelled: LabelledImages,
        *,
        rank: int,
        world_size: int,
    ) -> None:
        require_shared_evenly(config, world_size)
        self.wanted, self.corpus, self.labelled = wanted, corpus, labelled
        self.fingerprint = fingerprint_of(corpus, labelled)
        seed = int(hash_coordinates(config.run.seed, _VIEWS) >> np.uint64(1))  # other views than the stream's own
        order = SupportOrder(labelled, seed=config.run.seed, classes=wanted.classes, images=wanted.images)
        data = replace(config.data, crops=[replace(config.data.crops[0], num=wanted.views)])
        train, run = replace(config.train, global_batch=wanted.size), replace(config.run, seed=seed)
        own = replace(config, data=data, train=train, run=run)
        self.batches = BatchMaker(LabelledReader(corpus, labelled), order, own, rank=rank, world_size=world_size)
        places = rank_places(wanted.size, accumulate=train.accumulate, rank=rank, world_size=world_size)
        self._labels = torch.from_numpy(places % wanted.classes)

    def summary(self) -> str:
        """How many there are, and how many join a step."""
        wanted, labelled = self.wanted, self.labelled
        return (
            f"{wanted.images} of each of {wanted.classes} classes join every step, of {len(labelled.ids):,} in "
            f"{len(labelled.classes):,} classes"
        )

    def of(self, batch: Batch, device: torch.device) -> Supports:
        """What the method sees of a loaded batch."""
        labels, ids = (values.to(device, non_blocking=True) for values in (self._labels, batch.ids))
        return Supports(batch.views[0], labels, ids)


def require_shared_evenly(config: Config, ranks: int) -> None:
    """Check that every micro-batch of every rank has equally many of the supports that the method asks for, if any.

    Raises:
        InputError: they are not divisible.
    """
    wanted, accumulate = config.method.supports(), config.train.accumulate
    if wanted is not None and wanted.size % (ranks * accumulate):
        raise InputError(
            f"method.support.images={wanted.images}: {wanted.classes} classes x {wanted.images} images = "
            f"{wanted.size} are not divisible by {ranks} ranks x train.accumulate={accumulate}; "
            f"choose another number of images, of classes or of ranks"
        )


def open_supports(config: Config, *, rank: int, world_size: int) -> SupportBatches | None:
    """The labelled images that the method of a run asks for, if it does.

    Raises:
        InputError: there are no labels, fewer classes than a step takes, or a number that ranks do not divide.
    """
    if (wanted := config.method.supports()) is None:
        return None
    folder = wanted.shards or corpus_settings(config.data)[0][0]
    if is_url(folder):
        raise InputError(
            f"method.support.shards={folder}: labelled images are read in random order, which no store is made for; "
            f"name a folder on this machine that has them"
        )
    corpus = Corpus(read_manifest(folder), patience_s=config.data.store_patience_s)
    labelled = labelled_images(corpus, wanted)
    if len(labelled.classes) < wanted.classes:
        raise InputError(
            f"method.support.classes={wanted.classes}: expected at most {len(labelled.classes)}, the classes of which "
            f"{folder} has labelled images"
        )
    return SupportBatches(config, wanted, corpus, labelled, rank=rank, world_size=world_size)


def labelled_images(corpus: Corpus, wanted: SupportConfig) -> LabelledImages:
    """The images of a folder whose labels may be used.

    Raises:
        InputError: none has a label, or the list cannot be used.
    """
    numbers = range(len(corpus.manifest.shards))
    labels = np.concatenate([read_index(corpus.manifest.index_path(number)).label for number in numbers])
    ids = np.array(read_subset(wanted.subset, corpus)) if wanted.subset else np.arange(len(labels))
    ids = ids[labels[ids] >= 0]
    if len(ids) == 0:
        what = f"no image that {wanted.subset} lists has a label" if wanted.subset else "no image has a label"
        raise InputError(
            f"{corpus.manifest.root}: {what}; supports need some, as `shards convert` makes of class folders"
        )
    own = labels[ids].astype(np.int64)
    if wanted.share < 1:
        rows = stratified_rows(ids, own, wanted.share, wanted.seed)
        ids, own = ids[rows], own[rows]
    return LabelledImages(ids, own)


def fingerprint_of(corpus: Corpus, labelled: LabelledImages) -> str:
    """Identifies the images of a folder whose labels may be used."""
    content = np.concatenate([labelled.ids, labelled.classes, labelled.sizes])
    return f"{corpus.fingerprint()}/{xxhash.xxh3_128_hexdigest(content.tobytes())}"


def with_supports(images: str, supports: str) -> str:
    """The fingerprint of what a run is trained on, from those of its images and of its supports."""
    return f"{images}{_AND}{supports}"


def parts_of(fingerprint: str) -> tuple[str, str]:
    """The fingerprints of the images and of the supports that a run is trained on; the second is empty without."""
    images, _, supports = fingerprint.partition(_AND)
    return images, supports
