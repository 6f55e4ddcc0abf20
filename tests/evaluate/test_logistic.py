"""Logistic regression, and the protocols that are made of it, against scikit-learn's on the same features.

Covers: largescale/evaluate/linear_cached.py, largescale/evaluate/low_shot.py, largescale/evaluate/splits.py
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from largescale.evaluate import linear_cached, logistic, low_shot
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.splits import held_out, stratified
from shards.ground.errors import InputError
from tests.helpers.features import features

STRENGTHS = [1.0, 0.1, 0.01, 0.001]


def by_scikit_learn(train: FeatureSet, test: FeatureSet, strength: float) -> tuple[float, np.ndarray]:
    """Accuracy, and probabilities of the test samples."""
    mean, std = train.features.mean(0), train.features.std(0)
    model = LogisticRegression(C=1 / (strength * len(train)), tol=1e-8, max_iter=5000)
    model.fit(((train.features - mean) / std).double(), train.labels)
    x = ((test.features - mean) / std).double()
    return model.score(x, test.labels), model.predict_proba(x)


def test_every_strength_is_the_optimum_that_scikit_learn_finds():
    train, test = features(600, 0), features(1000, 1)
    found = logistic.fit(train.features, train.labels, 4, STRENGTHS)
    assert found.converged.all() and found.steps < 60
    shares = torch.einsum("nd,sdc->snc", found.standardiser(test.features), found.weights).softmax(2)
    for place, (strength, right) in enumerate(
        zip(STRENGTHS, found.num_right(test.features, test.labels).tolist(), strict=True)
    ):
        accuracy, probabilities = by_scikit_learn(train, test, strength)
        assert right / 1000 == pytest.approx(accuracy, abs=0.00201)
        np.testing.assert_allclose(shares[place].numpy(), probabilities, atol=2e-3)


def test_blocks_change_nothing_and_constant_features_decide_nothing(monkeypatch):
    train, test = features(300, 0), features(200, 1)
    whole = logistic.fit(train.features, train.labels, 4, STRENGTHS)
    monkeypatch.setattr(logistic, "_BLOCK_BYTES", 20000)
    cut = logistic.fit(train.features, train.labels, 4, STRENGTHS)
    torch.testing.assert_close(cut.weights.abs(), whole.weights.abs(), atol=1e-3, rtol=1e-3)  # axes have no sign
    right = whole.num_right(test.features, test.labels)
    assert torch.equal(cut.num_right(test.features, test.labels), right)
    alive = torch.linspace(-50, 50, 200)[:, None]  # a dead unit that comes alive on test images
    wider = logistic.fit(torch.cat([train.features, torch.full((300, 1), 0.1)], 1), train.labels, 4, STRENGTHS)
    assert torch.equal(wider.num_right(torch.cat([test.features, alive], 1), test.labels), right)


def test_a_strength_is_chosen_without_the_test_samples_and_top_5_counts_more(capsys):
    train, test = features(400, 0), features(200, 1)
    config = linear_cached.Settings(linear_cached_strengths=STRENGTHS)
    right = linear_cached.measure(train, test, config)
    bars = capsys.readouterr().err
    assert f"linear-cached, {len(STRENGTHS)} strengths: " in bars and "linear-cached: " in bars
    fooled = linear_cached.measure(train, replace(test, labels=(test.labels + 1) % 4), config)
    assert right["sweep"] == fooled["sweep"] and right["strength"] == fooled["strength"]
    assert right["sweep"][str(right["strength"])] == max(right["sweep"].values())
    assert fooled["top1"] < 0.3 < right["top1"] and right["top5"] is None and right["converged"]
    assert right["top1"] == pytest.approx(by_scikit_learn(train, test, right["strength"])[0], abs=0.005)
    named = [replace(one, classes=(*one.classes, "e", "f")) for one in (train, test)]  # two classes without a sample
    assert right["top1"] <= linear_cached.measure(*named, config)["top5"] <= 1


def test_one_class_or_one_sample():
    train = replace(features(30, 0), labels=torch.zeros(30, dtype=torch.int64))
    assert linear_cached.measure(train, train, linear_cached.Settings())["top1"] == 1.0
    with pytest.raises(InputError, match="1 labelled training image"):
        linear_cached.measure(features(1, 0), train, linear_cached.Settings())


def test_splits_follow_from_ids_and_are_nested_and_stratified():
    ids, labels = torch.arange(1000), torch.arange(1000) % 10
    small, large = (stratified(ids, labels, share, 3) for share in (0.01, 0.1))
    assert torch.bincount(labels[small]).tolist() == [1] * 10 and torch.bincount(labels[large]).tolist() == [10] * 10
    assert set(small.tolist()) < set(large.tolist()) != set(stratified(ids, labels, 0.1, 4).tolist())
    turned = stratified(ids.flip(0), labels.flip(0), 0.1, 3)  # the order of the samples does not matter
    assert set(ids.flip(0)[turned].tolist()) == set(large.tolist())
    kept, held = held_out(ids)
    assert len(held) == 100 and sorted([*kept.tolist(), *held.tolist()]) == ids.tolist()
    assert [len(part) for part in held_out(torch.arange(2))] == [1, 1]


def test_low_shot_improves_with_the_share_and_reports_every_split():
    train, test = features(600, 0), features(300, 1)
    found = low_shot.measure(train, test, low_shot.Settings(low_shot_splits=3))
    few, more = found["by_share"]["0.01"], found["by_share"]["0.1"]
    assert found["top1"] == few["top1"] < more["top1"] and len(few["splits"]) == 3 and few["std"] > 0
    assert abs(few["num_train"] - 6) <= 2 and abs(more["num_train"] - 60) <= 2
    with pytest.raises(InputError, match="training images are 1"):
        low_shot.measure(features(1, 0), test, low_shot.Settings())
