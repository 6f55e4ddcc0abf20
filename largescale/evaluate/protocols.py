"""The protocols of `largescale evaluate`, by name: each has a file with its settings, and an entry here.

Their settings are part of every configuration, so every command imports them all. SciPy and scikit-learn, which take
two seconds of a processor to import, are therefore imported by the functions that use them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from largescale.config import EvaluateConfig
from largescale.config.setting import a_name
from largescale.evaluate import (
    action,
    clusters,
    cross_modal,
    detection,
    finetune,
    knn,
    layers,
    linear,
    linear_augmented,
    linear_cached,
    low_shot,
    low_shot_finetune,
    own_classifier,
    own_task,
    retrieval,
    segmentation,
    sound_localisation,
    spectrum,
    support_neighbours,
    svm,
)
from largescale.evaluate.targets import is_used
from largescale.evaluate.ways import (
    Way,
    by_dense_training,
    by_features,
    by_features_and_heads,
    by_features_and_labels,
    by_lists,
    by_test_features,
    by_training,
)
from largescale.evaluate.without_labels import by_images_alone
from shards.ground.errors import InputError

COMMON = frozenset(item.name for item in fields(EvaluateConfig))
"""Keys under `evaluate` that all protocols have."""


@dataclass(frozen=True)
class Protocol:
    """One entry of `PROTOCOLS`.

    Attributes:
        measure: what a network is worth: from what its `way` gives, and its own `Settings`. What it returns has at
            least the `metric`; sentences under `doubts` become warnings, and which test images are right, under `hits`,
            a paired test.
        Settings: the keys under `evaluate` that it has beside those of all.
        chosen_on: on what it chooses settings, if any: never on the test images.
        metric: the value that is quoted, by its name in a result.
        title: of the metric, for people.
        is_share: whether it is one, to be shown in percent.
        on_training_images: whether its values are of these; test images are then not needed.
        trains: whether it learns anything of training images; if not, test images alone are needed.
        way: what it measures: see `ways.py`.
        of_classes: whether samples must be of classes.
        depends_on: beginnings of keys not under `evaluate` that change its values, as where it draws views.
    """

    measure: Callable[..., dict[str, Any]]
    Settings: type[EvaluateConfig]
    chosen_on: str
    metric: str = "top1"
    title: str = "top-1"
    is_share: bool = True
    on_training_images: bool = False
    trains: bool = True
    way: Way = by_features
    of_classes: bool = True
    depends_on: tuple[str, ...] = ()

    def own_keys(self) -> list[str]:
        """The keys under `evaluate` that it has beside those of all."""
        return [item.name for item in fields(self.Settings) if item.name not in COMMON]


PROTOCOLS = {
    "knn": Protocol(knn.measure, knn.Settings, knn.CHOSEN_ON),
    "linear": Protocol(linear.measure, linear.Settings, linear.CHOSEN_ON),
    "linear-cached": Protocol(linear_cached.measure, linear_cached.Settings, linear_cached.CHOSEN_ON),
    "low-shot": Protocol(low_shot.measure, low_shot.Settings, low_shot.CHOSEN_ON, title="top-1, smallest share"),
    "linear-augmented": Protocol(
        linear_augmented.measure, linear_augmented.Settings, linear_augmented.CHOSEN_ON, way=by_training
    ),
    "layers": Protocol(layers.measure, layers.Settings, layers.CHOSEN_ON, title="top-1, features", way=by_training),
    "finetune": Protocol(finetune.measure, finetune.Settings, finetune.CHOSEN_ON, way=by_training),
    "low-shot-finetune": Protocol(
        low_shot_finetune.measure, low_shot_finetune.Settings, low_shot_finetune.CHOSEN_ON, way=by_training
    ),
    "own-classifier": Protocol(
        own_classifier.measure,
        own_classifier.Settings,
        own_classifier.CHOSEN_ON,
        title="top-1, its own classifier",
        trains=False,
        way=own_classifier.by_own_classifier,
    ),
    "own-task": Protocol(
        own_task.measure,
        own_task.Settings,
        own_task.CHOSEN_ON,
        metric=own_task.ACCURACY,
        title="share of its own task told right",
        trains=False,
        way=own_task.by_own_task,
        of_classes=False,
        depends_on=("data.crops", "data.augment.", "method.", *own_task.BATCH),
    ),
    "support-neighbours": Protocol(
        support_neighbours.measure,
        support_neighbours.Settings,
        support_neighbours.CHOSEN_ON,
        title="top-1, own labels or smallest share",
        way=by_features_and_labels,
    ),
    "retrieval": Protocol(
        retrieval.measure,
        retrieval.Settings,
        retrieval.CHOSEN_ON,
        metric="map",
        title="mean average precision",
        trains=False,
        way=by_test_features,
    ),
    "svm": Protocol(
        svm.measure,
        svm.Settings,
        svm.CHOSEN_ON,
        metric="map_11_points",
        title="mean average precision (VOC07, 11 points)",
        way=by_lists,
        of_classes=False,
    ),
    "segmentation": Protocol(
        segmentation.measure,
        segmentation.Settings,
        segmentation.CHOSEN_ON,
        metric="miou",
        title="mean intersection over union",
        way=by_dense_training,
        of_classes=False,
    ),
    "detection": Protocol(
        detection.measure,
        detection.Settings,
        detection.CHOSEN_ON,
        metric="box_ap",
        title="box AP (COCO)",
        way=by_dense_training,
        of_classes=False,
    ),
    "action": Protocol(action.measure, action.Settings, action.CHOSEN_ON, way=action.by_clips),
    "cross-modal": Protocol(
        cross_modal.measure,
        cross_modal.Settings,
        cross_modal.CHOSEN_ON,
        metric="recall",
        title="recall of the other half",
        trains=False,
        way=cross_modal.by_pairs,
        of_classes=False,
    ),
    "sound-localisation": Protocol(
        sound_localisation.measure,
        sound_localisation.Settings,
        sound_localisation.CHOSEN_ON,
        metric="hit_rate",
        title="best place in the box",
        trains=False,
        way=sound_localisation.by_sound_maps,
        of_classes=False,
    ),
    "clusters": Protocol(
        clusters.measure,
        clusters.Settings,
        clusters.CHOSEN_ON,
        metric="nmi",
        title="NMI of k-means",
        way=by_features_and_heads,
    ),
    "spectrum": Protocol(
        spectrum.measure,
        spectrum.Settings,
        spectrum.CHOSEN_ON,
        metric="effective_rank",
        title="effective rank",
        is_share=False,
        on_training_images=True,
        way=by_images_alone,
        of_classes=False,
        depends_on=("data.crops", "data.augment."),
    ),
}


def protocol_named(name: str) -> Protocol:
    """An entry of `PROTOCOLS`.

    Raises:
        InputError: there is none of this name.
    """
    if name not in PROTOCOLS:
        raise InputError(f"largescale evaluate {name}: expected {a_name(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def owners_of(override: str) -> list[str]:
    """The protocols whose own setting an override replaces; none for one that all have, and for other settings."""
    section, _, key = override.split("=", 1)[0].partition(".")
    return [name for name, protocol in PROTOCOLS.items() if section == "evaluate" and key in protocol.own_keys()]


def check_settings(names: Sequence[str], overrides: Sequence[str]) -> None:
    """Refuse settings of other protocols than some: whoever passes one expects it to change the figure.

    Raises:
        InputError: there is no protocol of a name, or an override is of others.
    """
    own = {name: [f"evaluate.{key}" for key in protocol_named(name).own_keys()] for name in names}
    for override in overrides:
        owners = owners_of(override)
        if owners and not set(owners) & set(names):
            ours = "; ".join(
                f"the settings of {name} itself are {', '.join(keys) or 'none'}" for name, keys in own.items()
            )
            raise InputError(f"{override}: used by `largescale evaluate {' and '.join(owners)}` alone; {ours}")


def settings_for(names: Sequence[str], overrides: Sequence[str]) -> dict[str, list[str]]:
    """The overrides that each of some protocols gets: all but those that only others of them use.

    Raises:
        InputError: there is no protocol of a name, or none of them uses an override of protocols.
    """
    if not all(names):
        raise InputError(f"largescale evaluate {','.join(names)}: a name is missing before or after a comma")
    check_settings(names, overrides)
    used_by = {override: _users_of(override, names) for override in overrides}
    return {name: [override for override in overrides if name in used_by[override]] for name in names}


def _users_of(override: str, names: Sequence[str]) -> Sequence[str]:
    """Those of some protocols that an override may matter to; all of them, to warn of it, if it matters to none."""
    owners = owners_of(override)
    return owners or [name for name in names if is_used(override, PROTOCOLS[name].depends_on)] or names
