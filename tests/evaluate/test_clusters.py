from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from largescale.evaluate.clusters import Settings, agreement, matched_share, measure
from shards.ground.errors import InputError
from tests.helpers.features import features


def test_matching_is_the_best_of_all_and_names_of_clusters_do_not_matter():
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 200)
    clusters = np.where(random.random(200) < 0.6, (labels + 1) % 4, random.integers(0, 4, 200))
    best = max(np.mean(np.array(names)[clusters] == labels) for names in permutations(range(4)))
    assert matched_share(labels, clusters) == pytest.approx(best)
    perfect = agreement(torch.from_numpy(labels), (labels + 2) % 4)
    assert [perfect[name] for name in ("nmi", "ami", "ari", "matched")] == pytest.approx([1, 1, 1, 1])
    split = agreement(torch.from_numpy(labels), labels + 4 * random.integers(0, 2, 200))  # each class in two clusters
    assert split["num_clusters"] == 8 and split["matched"] < 0.7 and split["nmi"] < 1


def test_k_means_finds_classes_that_lie_apart():
    train, test = features(300, 0, spread=0.1), features(100, 1, spread=0.1)
    found = measure(train, test, Settings())
    assert found["num_clusters"] == 4 and found["nmi"] > 0.8 and found["matched"] > 0.8
    assert measure(train, test, Settings(clusters_count=2))["num_clusters"] == 2
    by_class = measure(train, test, Settings(), ("prototype", (test.labels + 1) % 4))
    assert by_class.pop("by_prototype")["nmi"] == pytest.approx(1) and by_class == found
    with pytest.raises(InputError, match="3 training images for 4 clusters"):
        measure(features(3, 0), test, Settings())
