"""Accuracy of a classifier that the run has trained itself, as a student has that learns from a teacher.

Nothing is trained: the method's own scores of the test images, centre crops, in evaluation mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from largescale.config import EvaluateConfig
from largescale.evaluate.extract import extract
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.image_training import accuracies, labelled
from largescale.evaluate.subject import Subject
from largescale.evaluate.ways import Measure, Measured, of_classes
from largescale.evaluate.weights import method_of, what_is_measured
from shards.ground.errors import InputError

CHOSEN_ON = "nothing; nothing is trained"


@dataclass
class Settings(EvaluateConfig):
    """It has no keys of its own under `evaluate`."""


def measure(scores: FeatureSet | None, config: Settings) -> dict[str, Any]:
    """Top-1 (and top-5) accuracy. Collectives: one broadcast of an object."""
    return accuracies(scores)


def by_own_classifier(measure: Measure, subject: Subject) -> Measured:
    """`measure(scores, settings)` of the scores [N, K] of the test images, on rank 0.

    Raises:
        InputError: the method has no classifier, or one of other classes.

    Collectives: every rank must call it; those of `extract` and of `measure`.
    """
    config, [_, corpus] = subject.config, subject.shards
    networks = {"pretrained": True, **({"untrained": False} if config.evaluate.baselines else {})}
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    methods = {
        name: method_of(config, subject.weights, trained=trained).to(device) for name, trained in networks.items()
    }
    names = list(methods["pretrained"].class_names)
    if not names:
        raise InputError(
            f"own-classifier: {what_is_measured(config, subject.weights)} classifies nothing by itself; use linear or "
            "finetune"
        )
    if names != list(corpus.manifest.classes):
        raise InputError(
            f"data.eval_shards={corpus.where}: its {len(corpus.manifest.classes)} classes are not the "
            f"{len(names)} that this run tells apart ({', '.join(names[:3])}, ...); use shards of these"
        )
    scores = extract(corpus, config, {name: method.classify for name, method in methods.items()}, device)
    results = {name: measure(scores.get(name), config.evaluate) for name in networks}
    return of_classes(results, subject, None, labelled(corpus))
