"""Why an accuracy may say more, or less, than it seems to: images on both sides, classes that cannot be found."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from largescale.config import Config, corpus_settings
from largescale.data.corpora import Corpus
from largescale.evaluate.feature_set import FeatureSet
from shards.format.manifest import Manifest, read_manifest
from shards.format.shard_index import read_index
from shards.ground.errors import InputError
from shards.stores.store import is_url

_MOST_COMPARED = 20_000_000
"""Samples whose checksums are read; more would take longer than the evaluation."""
_SHARDS_AT_A_TIME = 1000


def doubts(config: Config, shards: tuple[Corpus, Corpus]) -> list[str]:
    """Sentences for the terminal, the result file and the report, about training and test images.

    Args:
        config: whose `data.shards` the network was trained on.
        shards: training and test shards.
    """
    return [sentence for sentence in (_same_images(*shards), _trained_on(config, *shards)) if sentence]


def class_doubts(train: FeatureSet | None, test: FeatureSet) -> list[str]:
    """Sentences about the classes of training images, if any take part, and test images."""
    unknown = "" if train is None else _unknown_classes(train, test)
    return [sentence for sentence in (unknown, _single_class(test)) if sentence]


def num_shared(train: Corpus, test: Corpus) -> int:
    """Test samples whose bytes are among the training samples too.

    Images are compared by the checksums of the indexes; where a side is in a store, or is very large, tars by those of
    the manifests, so that nothing is fetched for it.
    """
    if train.fingerprint() == test.fingerprint():
        return test.manifest.num_samples
    far = train.cache is not None or test.cache is not None
    if far or train.manifest.num_samples > _MOST_COMPARED:
        return num_in_shared_shards(train.manifest, test.manifest)
    wanted, found = np.concatenate(list(_checksums(test.manifest))), 0
    for some in _checksums(train.manifest):
        seen = np.isin(wanted, some)
        found, wanted = found + int(seen.sum()), wanted[~seen]
    return found


def num_in_shared_shards(train: Manifest, test: Manifest) -> int:
    """Test samples in tars that are, byte for byte, among the training tars."""
    known = {shard.checksum for shard in train.shards}
    return sum(shard.num_samples for shard in test.shards if shard.checksum in known)


def _checksums(manifest: Manifest) -> Iterator[np.ndarray]:
    """Those of all samples, of many shards at a time."""
    numbers = range(len(manifest.shards))
    for start in range(0, len(numbers), _SHARDS_AT_A_TIME):
        some = numbers[start : start + _SHARDS_AT_A_TIME]
        yield np.concatenate([read_index(manifest.index_path(number)).checksum for number in some])


def _same_images(train: Corpus, test: Corpus) -> str:
    shared, total = num_shared(train, test), test.manifest.num_samples
    if not shared:
        return ""
    which = "all" if shared == total else f"{shared:,} of the"
    return (
        f"{which} {total:,} test images are among the labelled training images too, byte for byte: the accuracy "
        f"is inflated; use other data.eval_shards or evaluate.train_shards"
    )


def _trained_on(config: Config, train: Corpus, test: Corpus) -> str:
    """Test images that the pretraining saw, where its shards are here and are not the training side anyway."""
    shared = 0
    for location, _, _ in corpus_settings(config.data):
        try:
            pretraining = None if is_url(location) else Corpus(read_manifest(location))
            if pretraining is not None and pretraining.fingerprint() != train.fingerprint():
                shared += num_shared(pretraining, test)
        except (InputError, OSError):
            pass  # evaluation does not need them
    return (
        f"{shared:,} of the test images are among those the network was pretrained on (data.shards), without "
        f"their labels"
        if shared
        else ""
    )


def _unknown_classes(train: FeatureSet, test: FeatureSet) -> str:
    missing = sorted(set(test.labels.tolist()) - set(train.labels.tolist()))
    if not missing:
        return ""
    num = int(torch.isin(test.labels, torch.tensor(missing)).sum())
    return (
        f"{len(missing)} classes of the test images ({train.classes[missing[0]]}, ...) have no labelled training "
        f"image: {num:,} of {len(test):,} test images cannot be classified correctly"
    )


def _single_class(test: FeatureSet) -> str:
    classes = test.labels.unique().tolist()
    if len(classes) > 1:
        return ""
    return (
        f"all {len(test):,} test images are of one class ({test.classes[classes[0]]}): the figures say nothing of how "
        f"well classes are told apart; use other data.eval_shards"
    )
