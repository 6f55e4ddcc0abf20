"""The features that were evaluated, and the images that they are of.

Images are looked up through the stamps of the features, never through the run's configuration: what the configuration
names may be other shards than those that were evaluated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from largescale.config import Config, corpus_settings
from largescale.data.corpora import open_corpus
from largescale.data.reader import ShardReader
from largescale.evaluate import corpora_shown
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.features import path_of
from largescale.evaluate.knn import nearest
from largescale.evaluate.made_from import VERSION, shards_stamp
from largescale.report.unmeasured import needed
from shards.ground.errors import InputError

MOST_TEST, MOST_BANK = 1500, 50_000
"""Test images that are shown on the map and classified, and training images that they are compared with."""

_VOTERS, _TEMPERATURE = 20, 0.07


@dataclass(frozen=True)
class Part:
    """Features of some images, and the reader of these images."""

    features: FeatureSet
    reader: ShardReader

    def class_of(self, row: int) -> str:
        """The name of a row's class."""
        return self.features.classes[int(self.features.labels[row])]

    @property
    def name(self) -> str:
        """Of the shard folder."""
        return str(self.features.made_from["shards"]["name"])

    @property
    def what(self) -> str:
        """Images and network in words."""
        return described(self.features.made_from)


@dataclass(frozen=True)
class Predictions:
    """kNN's decisions on M test images: their rows in the test set, numbers of classes, shares of the votes."""

    rows: np.ndarray
    classes: np.ndarray
    confidence: np.ndarray


def part_of(run_dir: Path, config: Config, part: str) -> Part:
    """Features of the pretrained network on `train` or `test`, with their images.

    Raises:
        InputError: there are none, they do not say what they were made from, or the images are nowhere.
    """
    path = path_of(run_dir, "pretrained", part)
    if not path.is_file():
        raise InputError(needed(config))
    features = FeatureSet.load(path)
    if features.made_from.get("version") != VERSION:
        raise InputError("The features were written by another version; run `largescale evaluate knn RUN` again.")
    return Part(features, reader_of(features.made_from["shards"], config))


def corpora_of(run_dir: Path, config: Config, like: FeatureSet) -> list[Part]:
    """Some images of each corpus that the run was trained on, if there are several, as far as they are of its weights.

    Args:
        run_dir, config: of the run.
        like: features of the network that is shown.

    Raises:
        InputError: the images are nowhere.
    """
    parts = []
    for number in range(len(corpus_settings(config.data))):
        path = corpora_shown.path_of(run_dir, number)
        features = FeatureSet.load(path) if path.is_file() else None
        if features and all(features.made_from[key] == like.made_from[key] for key in ("version", "weights", "images")):
            parts.append(Part(features, reader_of(features.made_from["shards"], config)))
    return parts


def both_parts(run_dir: Path, config: Config, *, same_classes: bool = True) -> tuple[Part, Part]:
    """Training and test features of the same network.

    Args:
        run_dir: of the run.
        config: its configuration.
        same_classes: whether numbers of classes must mean the same in both.

    Raises:
        InputError: as `part_of`, or they are of different networks or classes.
    """
    train, test = part_of(run_dir, config, "train"), part_of(run_dir, config, "test")
    made = train.features.made_from, test.features.made_from
    if any(made[0][key] != made[1][key] for key in ("weights", "images")):
        raise InputError("Features of training and test images are of different networks; evaluate again.")
    if same_classes and train.features.classes != test.features.classes:
        raise InputError(
            f"Test images ({test.what}) have other classes than training images; `largescale evaluate knn` again, with "
            f"both of the same classes."
        )
    return train, test


def reader_of(stamp: dict[str, Any], config: Config) -> ShardReader:
    """The shards that a stamp names: where they were, or where the configuration now says, if they are the same.

    Raises:
        InputError: they are nowhere.
    """
    trained_on = [place for place, _, _ in corpus_settings(config.data)]
    known = [stamp["location"], config.data.eval_shards, config.evaluate.train_shards, *trained_on]
    why = ""
    for location in dict.fromkeys(place for place in known if isinstance(place, str) and place):
        try:
            corpus = open_corpus(location, config.data)
            if shards_stamp(corpus, location)["fingerprint"] == stamp["fingerprint"]:
                corpus.check_files()
                return ShardReader([corpus])
            why = why or "other shards are there now"
        except (InputError, OSError) as error:
            why = why or str(error)
    raise InputError(f"The images that were evaluated cannot be shown: those of {stamp['location']} ({why}).")


def described(stamp: dict[str, Any]) -> str:
    """Images and network of a stamp in words."""
    return f"{stamp['shards']['name']}, network of step {stamp['weights']['step']:,}"


def chosen_rows(num: int, most: int, seed: int) -> np.ndarray:
    """At most `most` of `num` rows, ascending; the same for the same seed."""
    return np.sort(np.random.default_rng(seed).permutation(num)[:most])


def predictions(train: FeatureSet, test: FeatureSet, seed: int) -> Predictions:
    """kNN (k = 20, T = 0.07) on at most MOST_TEST test images, with a bank of at most MOST_BANK training images."""
    rows = chosen_rows(len(test), MOST_TEST, seed)
    bank = chosen_rows(len(train), MOST_BANK, seed)
    cosines, found = nearest(train.features[bank], test.features[rows], min(_VOTERS, len(bank)))
    votes = torch.exp((cosines - cosines[:, :1]).double() / _TEMPERATURE)
    tally = votes.new_zeros(len(rows), len(train.classes))
    tally.scatter_add_(1, train.labels[bank][found], votes)
    share, classes = (tally / tally.sum(1, keepdim=True)).max(1)
    return Predictions(rows, classes.numpy(), share.numpy())
