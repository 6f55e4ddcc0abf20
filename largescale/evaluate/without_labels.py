"""How features are measured that no label is known of: of a part of the training images, and of views of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from largescale.evaluate.extract import drop_equal_channels, extract
from largescale.evaluate.features import NETWORKS, Networks
from largescale.evaluate.spectrum import Settings, chosen_images
from largescale.evaluate.subject import Subject
from largescale.evaluate.views import features_of_views
from largescale.evaluate.ways import Measured
from largescale.processes import from_rank_0, on_rank_0


def by_images_alone(measure: Callable[..., dict[str, Any]], subject: Subject) -> Measured:
    """`measure(features, views, settings)` of a `FeatureSet` without labels, and of features [V, N, D] of views; of
    raw pixels, or where no views are wanted, None in their place.

    Collectives: every rank must call it; those of `extract` and `features_of_views`, and two broadcasts.
    """
    config, corpus, settings = subject.config, subject.shards[0], cast(Settings, subject.config.evaluate)
    ids, viewed, num_views = chosen_images(corpus.manifest.num_samples, settings)
    networks = Networks(config, subject.weights)
    chosen = {name: networks[name] for name in (NETWORKS if config.evaluate.baselines else ["pretrained"])}
    sets = extract(corpus, config, chosen, networks.device, ids=ids.numpy(), labelled=False)
    views: dict[str, torch.Tensor] = {}
    if num_views:
        trained = {name: network for name, network in chosen.items() if name != "pixels"}
        views = features_of_views(corpus, config, trained, viewed.numpy(), num_views, networks.device)
    results: dict[str, dict[str, Any]] = {}

    def measured() -> None:
        if "pixels" in sets:
            [sets["pixels"]] = drop_equal_channels(sets["pixels"])
        results.update({name: measure(one, views.get(name), settings) for name, one in sets.items()})

    on_rank_0(measured)
    found = from_rank_0(results)
    num_images = int(found["pretrained"]["num_images"])
    return Measured(found, num_images, num_images, [])
