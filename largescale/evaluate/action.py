"""Actions: clips classified by the mean of frozen features of several frames, linearly and by nearest neighbours.

The common probe of what features of single images are worth on video (Wang et al., arXiv 1608.00859, average the
frames' scores alike): what happens in a clip counts as far as single frames show it, and their order does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from largescale.config import EvaluateConfig
from largescale.config.setting import setting
from largescale.data.corpora import Corpus
from largescale.data.reader import ShardReader
from largescale.evaluate import knn, linear_cached
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.features import features_of_subject
from largescale.evaluate.subject import Subject
from largescale.evaluate.ways import Measure, Measured, of_classes
from shards.ground.errors import InputError

CHOSEN_ON = "a tenth of the training clips"


@dataclass
class Settings(EvaluateConfig):
    """Keys under `evaluate`."""

    action_frames: int = setting(
        8,
        "Frames of a clip, evenly spaced, whose features are averaged; shorter clips show some twice.",
        at_least=1,
        at_most=1024,
        free=True,
    )


def by_clips(measure: Measure, subject: Subject) -> Measured:
    """`measure(train, test, settings)` of labelled clips, each a row: the mean over its frames.

    Raises:
        InputError: as `features_of_subject`, or a folder is of images.

    Collectives: those of `features_of_subject` and of `measure`.
    """
    config = subject.config.evaluate
    for key, corpus in zip(("evaluate.train_shards", "data.eval_shards"), subject.shards, strict=True):
        check_clips(corpus, key)
    train, test = features_of_subject(subject, frames=cast(Settings, config).action_frames)
    results = {network: measure(train[network], test[network], config) for network in train}
    return of_classes(results, subject, train["pretrained"], test["pretrained"])


def check_clips(corpus: Corpus, key: str) -> None:
    """That a folder is one of clips.

    Args:
        corpus: the folder.
        key: of the setting that names it.

    Raises:
        InputError: it is one of images.
    """
    if ShardReader([corpus]).clip(0) is None:
        raise InputError(f"{key}={corpus.where}: images, not clips; make clips with `shards convert --clips`")


def measure(train: FeatureSet, test: FeatureSet, config: Settings) -> dict[str, Any]:
    """Accuracy of logistic regression as in `linear-cached`, and of neighbours as in `knn`, both by default settings.

    Raises:
        InputError: fewer than two training clips.

    Collectives: every rank must call it; those of `knn.measure`.
    """
    found = linear_cached.measure(train, test, linear_cached.Settings())
    num_neighbours = min(knn.HEADLINE_K, len(train))
    near = knn.measure(train, test, knn.Settings(knn_neighbours=[num_neighbours]))
    return {
        **found,
        "top1_by_classifier": {"linear": found["top1"], f"{num_neighbours} nearest neighbours": near["top1"]},
        "num_frames": config.action_frames,
        "doubts": near["doubts"],
    }
