"""Why an accuracy may say more, or less, than it seems to: images on both sides, classes that cannot be found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from largescale.checkpoint.folder import Checkpoint
from largescale.config import Config, corpus_settings
from largescale.config.loading import config_of_values
from largescale.data.corpora import Corpus, read_subset
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.weights import Weights
from shards.format.manifest import Manifest, read_manifest
from shards.ground.errors import InputError
from shards.stores.store import is_url

_MOST_COMPARED = 20_000_000
"""Samples whose checksums are read; more would take longer than the evaluation."""
_SHARDS_AT_A_TIME = 1000


def doubts(config: Config, shards: tuple[Corpus, Corpus], weights: Weights | None = None) -> list[str]:
    """Sentences for the terminal, the result file and the report, about training and test images.

    Args:
        config: whose `data.shards` the network was trained on, if `weights` do not know better.
        shards: training and test shards.
        weights: of the network.
    """
    places = _places_of(config, weights)
    return [sentence for sentence in (_same_images(*shards), _trained_on(places, *shards)) if sentence]


def class_doubts(train: FeatureSet | None, test: FeatureSet) -> list[str]:
    """Sentences about the classes of training images, if any take part, and test images."""
    unknown = "" if train is None else _unknown_classes(train, test)
    return [sentence for sentence in (unknown, _single_class(test)) if sentence]


def num_shared(train: Corpus, test: Corpus) -> int:
    """Test samples whose bytes are among the training samples too; see `shared_samples`."""
    return int(shared_samples(train, test).sum())


def shared_samples(train: Corpus, test: Corpus) -> np.ndarray:
    """Which test samples have the bytes of training samples that are in use, bool [N].

    Images are compared by the checksums of the indexes; where a side is in a store, or is very large, tars by those of
    the manifests, so that nothing is fetched for it.
    """
    if train.fingerprint() == test.fingerprint():
        return np.ones(test.manifest.num_samples, bool)
    if _compared_by_tars(train, test):
        return in_shared_shards(train.manifest, test.manifest)
    wanted = np.concatenate(list(_checksums(test)))
    found = np.zeros(len(wanted), bool)
    for some in _checksums(train):
        left = np.flatnonzero(~found)
        found[left] = np.isin(wanted[left], some)
    return found


def _compared_by_tars(train: Corpus, test: Corpus) -> bool:
    far = train.cache is not None or test.cache is not None
    return far or train.manifest.num_samples > _MOST_COMPARED


def in_shared_shards(train: Manifest, test: Manifest) -> np.ndarray:
    """Which test samples are in tars that are, byte for byte, among the training tars, bool [N]."""
    known = {shard.checksum for shard in train.shards}
    return np.repeat([shard.checksum in known for shard in test.shards], [shard.num_samples for shard in test.shards])


def _checksums(corpus: Corpus) -> Iterator[np.ndarray]:
    """Those of all samples in use, of many shards at a time."""
    first, shards = corpus.first_samples, range(len(corpus.manifest.shards))
    for start in range(0, len(shards), _SHARDS_AT_A_TIME):
        some = shards[start : start + _SHARDS_AT_A_TIME]
        values = np.concatenate([corpus.index(number).checksum for number in some])
        if corpus.subset is not None:
            low, high = np.searchsorted(corpus.subset, [first[some[0]], first[some[-1] + 1]])
            values = values[corpus.subset[low:high] - first[some[0]]]
        yield values


def _same_images(train: Corpus, test: Corpus) -> str:
    shared, total = num_shared(train, test), test.manifest.num_samples
    if not shared:
        return ""
    which = "all" if shared == total else f"{shared:,} of the"
    return (
        f"{which} {total:,} test images are among the labelled training images too, byte for byte: the accuracy "
        f"is inflated; use other data.eval_shards or evaluate.train_shards"
    )


def _places_of(config: Config, weights: Weights | None) -> list[tuple[str, str]]:
    """Shards that a network was trained on, and their subsets: those that its checkpoint names, whatever `data.shards`
    has become, or those of the configuration, where they have been moved since.
    """
    own = [(place, subset) for place, _, subset in corpus_settings(config.data)]
    if not isinstance(weights, Checkpoint):
        return own
    trained = config_of_values(weights.progress["config"], str(weights.path))
    saved = [(place, subset) for place, _, subset in corpus_settings(trained.data)]
    return saved if all(is_url(place) or Path(place).is_dir() for place, _ in saved) else own


def _trained_on(places: list[tuple[str, str]], train: Corpus, test: Corpus) -> str:
    """Test images that the pretraining saw, where its shards are here and are not the training side anyway."""
    shared = np.zeros(test.manifest.num_samples, bool)
    for location, subset in places:
        try:
            if is_url(location):
                continue
            pretraining = Corpus(read_manifest(location))
            if subset and _compared_by_tars(pretraining, test):
                continue  # a tar does not tell what of it was left out, nor is a long list read for that
            if subset:
                pretraining = replace(pretraining, subset=read_subset(subset, pretraining))
            if pretraining.fingerprint() != train.fingerprint():
                shared |= shared_samples(pretraining, test)
        except (InputError, OSError):
            pass  # evaluation does not need them
    return (
        f"{shared.sum():,} of the test images are among those the network was pretrained on (data.shards), without "
        f"their labels"
        if shared.any()
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
