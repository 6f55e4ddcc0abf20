"""The map of features: what points are called, and where there is nothing to map; in a browser: test_page.py."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from largescale.evaluate.feature_set import FeatureSet
from largescale.report.evaluated import Predictions
from largescale.report.feature_map import CLASS, CORPUS, ERROR, feature_map
from shards.ground.errors import InputError


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_collapsed_network_has_no_map_and_a_reason(value):
    num = 60
    alike = FeatureSet(torch.full((num, 16), value), torch.arange(num) % 2, torch.arange(num), ("a", "b"))
    found = Predictions(np.arange(num), np.zeros(num, np.int64), np.ones(num))
    with pytest.raises(InputError, match="the network has collapsed"):
        feature_map(SimpleNamespace(features=alike), found)


def part(name: str, num: int, labels: list[int], classes: tuple[str, ...], seed: int) -> SimpleNamespace:
    x = torch.randn(num, 8, generator=torch.Generator().manual_seed(seed))
    return SimpleNamespace(name=name, features=FeatureSet(x, torch.tensor(labels), torch.arange(num), classes))


def test_images_of_corpora_are_told_apart_and_classes_go_by_name():
    test = part("held out", 40, [0, 1] * 20, ("cat", "dog"), 0)
    named, unlabelled = part("zoo", 10, [0, 1] * 5, ("dog", "emu"), 1), part("web", 5, [-1] * 5, (), 2)
    rows = np.arange(0, 40, 2)
    found = feature_map(test, Predictions(rows, np.array([0] * 19 + [1]), np.ones(20)), [named, unlabelled])
    names, groups = found.groups[CORPUS]
    assert names == ["held out (test)", "zoo", "web"] and groups.tolist() == [0] * 20 + [1] * 10 + [2] * 5
    assert found.images[:20, 1].tolist() == rows.tolist() and found.images[-5:].tolist() == [[2, n] for n in range(5)]
    names, groups = found.groups[CLASS]  # all test images shown are cats; an emu is of no class of the test images
    assert names == ["cat", "dog", "no class known"] and groups.tolist() == [0] * 20 + [1, 2] * 5 + [2] * 5
    names, groups = found.groups[ERROR]
    assert names[2] == "not a test image" and groups.tolist() == [0] * 19 + [1] + [2] * 15
    alone = feature_map(test, Predictions(rows, np.zeros(20, np.int64), np.ones(20)))
    assert CORPUS not in alone.groups and alone.groups[CLASS][0] == ["cat", "dog"] and len(alone.points) == 20
