from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.retrieval import Settings, measure
from shards.ground.errors import InputError
from tests.helpers.features import features


def by_definition(test: FeatureSet) -> tuple[float, float]:
    """Mean average precision and recall@5, one query and one hit at a time, in float64."""
    unit, precisions, hits = normalize(test.features.double(), dim=1), [], []
    for row in range(len(test)):
        order = [other for other in (unit @ unit[row]).argsort(descending=True).tolist() if other != row]
        relevant = [bool(test.labels[other] == test.labels[row]) for other in order]
        at_hits = [sum(relevant[: place + 1]) / (place + 1) for place, hit in enumerate(relevant) if hit]
        precisions.append(sum(at_hits) / len(at_hits))
        hits.append(any(relevant[:5]))
    return sum(precisions) / len(precisions), sum(hits) / len(hits)


def test_equals_the_definition_also_where_cosines_are_negative():
    test = features(120, 1)
    test = replace(test, features=test.features - test.features.mean(0))  # about half of the cosines are below 0
    expected = by_definition(test)
    found = measure(test, Settings())
    assert found["map"] == pytest.approx(expected[0], abs=1e-6)
    assert found["recall_at_5"] == expected[1] and found["num_queries"] == 120
    assert found["recall_at_1"] <= found["recall_at_5"] <= found["recall_at_10"]


def test_queries_without_a_partner_are_left_out_and_none_at_all_is_an_error():
    test = replace(features(4, 0), labels=torch.tensor([0, 0, 1, 2]))
    assert measure(test, Settings())["num_queries"] == 2
    with pytest.raises(InputError, match="no two of the 3 test images"):
        measure(replace(features(3, 0), labels=torch.tensor([0, 1, 2])), Settings())
