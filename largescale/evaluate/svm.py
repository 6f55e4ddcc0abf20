"""Several labels per image: one linear SVM per class on frozen features, measured by average precision.

VISSL's protocol for VOC07 (its svm_utils; Goyal et al., arXiv 1905.01235): features of length 1, scikit-learn's
LinearSVC (squared hinge, L2, dual) per class, positives weighted by 2, its cost chosen per class by average precision
over three folds of the training images. Reported as VOC07 does, the mean of the best precision at 11 recalls, and as
scikit-learn does, without interpolation. The published figures are of VISSL's third kind, the area under the best
precision, which lies close to scikit-learn's.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from largescale.config import EvaluateConfig
from largescale.config.setting import setting
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.label_lists import LabelLists, Labels, sorted_classes
from largescale.evaluate.shares import from_all_ranks
from largescale.processes import rank, world_size
from shards.ground.errors import InputError

if TYPE_CHECKING:
    from sklearn.svm import LinearSVC

CHOSEN_ON = "three folds of the training images, per class"

_FOLDS = 3

Listed = tuple[FeatureSet, LabelLists]


@dataclass
class Settings(EvaluateConfig):
    """Keys under `evaluate`."""

    svm_labels: str = setting(
        "json:labels",
        "Where the list of an image's labels is: json:FIELD, a field of its json member, or cls, its cls member.",
        min_length=1,
        free=True,
    )
    svm_uncertain: str = setting(
        "",
        "Where the list of labels is that an image may or may not have (VOC's difficult ones): they count as absent in "
        "training, and the image is left out of the test of these classes.",
        free=True,
    )
    svm_costs: list[float] = setting(
        [0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0],
        "Costs C of an error among which each class chooses.",
        above=0,
        at_most=1e9,
        min_length=1,
        free=True,
    )


@dataclass(frozen=True)
class Truth:
    """Which of the images are of which classes.

    Attributes:
        features: of length 1, float32 [N, D].
        present: bool [N, C].
        uncertain: bool [N, C].
        num_left_out: images without a list.
    """

    features: np.ndarray
    present: np.ndarray
    uncertain: np.ndarray
    num_left_out: int


def measure(train: Listed, test: Listed, config: Settings) -> dict[str, Any]:
    """Mean average precision over the classes that occur in training and test images, and that of each.

    Raises:
        InputError: no image has a list of labels, or no class can be measured.

    Collectives: every rank must call it; those of `LabelLists.read`, and one all-gather of objects.
    """
    lists = [part[1].read(config.svm_labels, part[0].ids) for part in (train, test)]
    none: list[list[Labels | None]] = [[frozenset()] * len(one) for one in lists]
    unsure = (
        [part[1].read(config.svm_uncertain, part[0].ids) for part in (train, test)] if config.svm_uncertain else none
    )
    classes = sorted_classes([*lists[0], *lists[1]])
    if not classes:
        raise InputError(f"evaluate.svm_labels={config.svm_labels}: no image has a label there; name another member")
    here, there = (
        _truth(part[0].features, given, perhaps, classes)
        for part, given, perhaps in zip((train, test), lists, unsure, strict=True)
    )
    found = _of_classes(classes, here, there, config.svm_costs)
    if not found:
        raise InputError(
            f"evaluate.svm_labels={config.svm_labels}: no class has training images with it and without it, and a test "
            f"image with it"
        )
    by_class = {name: found[name] for name in classes if name in found}
    return {
        "map_11_points": fmean(one["ap_11_points"] for one in by_class.values()),
        "map": fmean(one["ap"] for one in by_class.values()),
        "ap_by_class": {name: one["ap"] for name, one in by_class.items()},
        "by_class": by_class,
        "num_classes": len(by_class),
        "num_train": len(here.features),
        "num_test": len(there.features),
        "doubts": _doubts(classes, by_class, here, there),
    }


def _truth(features: Tensor, lists: list[Labels | None], unsure: list[Labels | None], classes: list[str]) -> Truth:
    rows = [row for row, labels in enumerate(lists) if labels is not None]
    x = features[rows].numpy()
    number = {name: place for place, name in enumerate(classes)}
    present, uncertain = (np.zeros((len(rows), len(classes)), bool) for _ in range(2))
    for place, row in enumerate(rows):
        present[place, [number[name] for name in lists[row] or ()]] = True
        uncertain[place, [number[name] for name in unsure[row] or () if name in number]] = True
    # Length 1 but for a millionth, as VISSL has it.
    x = x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-5)
    return Truth(x, present & ~uncertain, uncertain, len(lists) - len(rows))


def _of_classes(classes: list[str], train: Truth, test: Truth, costs: list[float]) -> dict[str, dict[str, Any]]:
    """By class, of those that can be measured; ranks share the classes. Collectives: one all-gather of objects."""
    from sklearn.exceptions import ConvergenceWarning  # see `protocols`
    from sklearn.metrics import average_precision_score

    own = {}
    numbers = range(rank(), len(classes), world_size())
    for number in tqdm(numbers, desc="SVMs", unit="class", leave=False, mininterval=1, disable=rank() > 0):
        y, sure = train.present[:, number], ~test.uncertain[:, number]
        truth = test.present[sure, number]
        if y.all() or not y.any() or not truth.any():
            continue
        cost = chosen_cost(train.features, y, costs)
        model = _svm(cost)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(train.features, y)
        scores = model.decision_function(test.features[sure])
        own[classes[number]] = {
            "ap_11_points": eleven_points(truth, scores),
            "ap": float(average_precision_score(truth, scores)),
            "cost": cost,
            "num_train": int(y.sum()),
            "num_test": int(truth.sum()),
            "converged": not said,
        }
    return from_all_ranks(own)


def chosen_cost(x: np.ndarray, y: np.ndarray, costs: list[float]) -> float:
    """The cost of the best average precision over folds of training images; the smallest where there is no fold."""
    from sklearn.exceptions import ConvergenceWarning  # see `protocols`
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    folds = min(_FOLDS, int(y.sum()), int((~y).sum()))
    if len(costs) == 1 or folds < 2:
        return min(costs)
    options: Any = {"scoring": "average_precision", "cv": StratifiedKFold(folds)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        means = {cost: cross_val_score(_svm(cost), x, y, **options).mean() for cost in costs}
    return max(costs, key=lambda cost: (means[cost], -cost))


def _svm(cost: float) -> LinearSVC:
    from sklearn.svm import LinearSVC  # see `protocols`

    return LinearSVC(C=cost, class_weight={True: 2, False: 1}, dual=True, tol=1e-4, max_iter=2000, random_state=0)


def eleven_points(truth: np.ndarray, scores: np.ndarray) -> float:
    """Average precision as VOC07 has it: the mean, over recalls of 0, 0.1, ... 1, of the best precision beyond."""
    from sklearn.metrics import precision_recall_curve  # see `protocols`

    precision, recall, _ = precision_recall_curve(truth, scores)
    # The last point of scikit-learn's curve stands for no image at all.
    precision, recall = precision[:-1], recall[:-1]
    return float(np.mean([precision[recall >= step / 10 - 1e-12].max() for step in range(11)]))


def _doubts(classes: list[str], by_class: dict[str, Any], train: Truth, test: Truth) -> list[str]:
    lines = [
        f"{one.num_left_out:,} {what} images are left out: they have no list of labels"
        for one, what in ((train, "training"), (test, "test"))
        if one.num_left_out
    ]
    if missing := [name for name in classes if name not in by_class]:
        names = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
        lines.append(
            f"{len(missing)} of {len(classes)} classes ({names}) are not measured: no training or no test image has "
            f"them, or all training images do"
        )
    if torn := [name for name, one in by_class.items() if not one["converged"]]:
        lines.append(f"the SVMs of {len(torn)} classes ({torn[0]}, ...) did not converge in 2,000 passes")
    return lines
