"""Cross-modal retrieval: images of clips rank sounds, sounds rank images, and both rank their own kind.

Of each test clip the frame in the middle is seen, and the window of sound around it heard. Between images and sounds,
recall@k counts how often the other half of the query's own clip is among the k nearest. In all four directions nDCG@k
counts, among other clips, those of the query's class (relevance 1, others 0), where there are classes; or all of them,
by how near they are in a tree of classes, as Arandjelovic and Zisserman do (arXiv 1712.06651, section 3.4).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor

from largescale.config import EvaluateConfig
from largescale.config.setting import setting
from largescale.evaluate.class_tree import class_relevance
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.hearing import Heard, heard_by
from largescale.evaluate.rankings import ndcg, recall_of_partners
from largescale.evaluate.subject import Subject
from largescale.evaluate.ways import Measure, Measured
from largescale.methods import Method
from shards.ground.errors import InputError

CHOSEN_ON = "nothing"

DIRECTIONS = {"image to sound": (0, 1), "sound to image": (1, 0), "image to image": (0, 0), "sound to sound": (1, 1)}
"""Which of images (0) and sounds (1) ask, and which are ranked."""

_ACROSS = ("image to sound", "sound to image")


@dataclass
class Settings(EvaluateConfig):
    """Keys under `evaluate`."""

    cross_modal_ranks: list[int] = setting(
        [1, 5, 10],
        "Values of k in recall@k: the share of queries whose own clip's other half is among the k nearest.",
        at_least=1,
        min_length=1,
        free=True,
    )
    cross_modal_places: int = setting(
        30, "Value of k in nDCG@k, where test clips have classes.", at_least=1, at_most=10**6, free=True
    )
    cross_modal_tree: str = setting(
        "",
        "Tree of classes by whose distances nDCG grades relevance: `names`, if classes are called by their paths, as "
        "animals/birds; or a file with lines of a class, a tab and what it belongs to. Empty: a class is relevant to "
        "itself alone.",
        free=True,
    )


def by_pairs(measure: Measure, subject: Subject) -> Measured:
    """`measure(pairs, settings)` of a `FeatureSet` of the test clips with sound, whose rows are the embeddings of an
    image and of its sound, side by side; and what chance gives on these.

    Raises:
        InputError: the method embeds no sounds, there are fewer than two clips with sound, or as `class_relevance` and
            `extract`.

    Collectives: every rank must call it; those of `heard_by` and of `measure`.
    """
    config = cast(Settings, subject.config.evaluate)
    class_relevance(subject.shards[1].manifest.classes, config.cross_modal_tree)  # before it takes time
    heard = heard_by(subject, "embed_sounds", "embeds no sounds", _pairs)
    shown = heard.sets["pretrained"]
    if len(shown) < 2:
        raise InputError(f"cross-modal: {len(shown)} test clip with sound; needs at least 2 to be ranked")
    results = {name: measure(pairs, config) for name, pairs in heard.sets.items()}
    results["chance"] = measure(replace(shown, features=torch.zeros(len(shown), 2)), config)
    return Measured(results, 0, len(shown), [*heard.doubts, *_unlabelled(heard)])


def _pairs(method: Method) -> partial[Tensor]:
    return partial(_both, method)


def _both(method: Method, images: Tensor, sounds: Tensor) -> Tensor:
    return torch.cat([method.embed_images(images).float(), method.embed_sounds(sounds).float()], dim=1)


def _unlabelled(heard: Heard) -> list[str]:
    labels = heard.sets["pretrained"].labels
    num = int((labels < 0).sum())
    return (
        [f"{num:,} of {len(labels):,} test clips have no class: nDCG leaves them out"] if 0 < num < len(labels) else []
    )


def measure(pairs: FeatureSet, config: Settings) -> dict[str, Any]:
    """Recall@k between images and sounds, the mean of both directions and each; nDCG of all four likewise.

    Collectives: every rank must call it; one all-reduce per direction of each.
    """
    halves, recalls = pairs.features.chunk(2, dim=1), {}
    found: dict[str, Any] = {}
    for direction in _ACROSS:
        asking, ranked = (halves[one] for one in DIRECTIONS[direction])
        recalls[direction] = recall_of_partners(asking, ranked, config.cross_modal_ranks)
    for place, k in enumerate(config.cross_modal_ranks):
        own = {direction: values[place] for direction, values in recalls.items()}
        found |= {f"recall_at_{k}": fmean(own.values()), f"recall_at_{k}_by_direction": own}
    labelled = pairs.labels >= 0
    labels = pairs.labels[labelled]
    if len(labels) > 1:
        relevance = class_relevance(pairs.classes, config.cross_modal_tree)
        gains = {}
        for direction, chosen in DIRECTIONS.items():
            asking, ranked = (halves[one][labelled] for one in chosen)
            gain = ndcg(asking, ranked, labels, relevance, config.cross_modal_places)
            if gain.num_queries:
                gains[direction] = gain.value
        if gains:
            name = f"ndcg_at_{config.cross_modal_places}"
            found |= {name: fmean(gains.values()), f"{name}_by_direction": gains}
    return {**found, "recall": found[f"recall_at_{config.cross_modal_ranks[0]}"]}
