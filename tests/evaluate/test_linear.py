from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from largescale.evaluate.linear import linear_probe
from shards.ground.errors import InputError
from tests.helpers.features import features

SETTINGS = {"learning_rates": [0.01, 0.1, 1.0], "epochs": 30, "batch_size": 64, "weight_decay": 0.0, "seed": 0}


def test_comes_near_the_optimum_of_logistic_regression():
    train, test = features(1000, 0), features(500, 1)
    result = linear_probe(train, test, **SETTINGS)
    mean, std = train.features.mean(0), train.features.std(0)
    optimum = LogisticRegression(C=1e6, max_iter=1000).fit((train.features - mean) / std, train.labels)
    expected = optimum.score((test.features - mean) / std, test.labels)
    assert result.top1 == pytest.approx(expected, abs=0.02)
    assert result.top5 is None  # four classes


def test_scale_and_offset_of_features_do_not_matter():
    train, test = features(400, 0), features(200, 1)
    scale, offset = torch.logspace(-3, 3, 6), torch.arange(6.0)
    moved = [replace(part, features=part.features * scale + offset) for part in (train, test)]
    assert linear_probe(*moved, **SETTINGS).top1 == pytest.approx(linear_probe(train, test, **SETTINGS).top1, abs=0.02)


def test_random_labels_give_chance():
    generator = torch.Generator().manual_seed(0)
    train, test = (
        replace(features(400, seed), labels=torch.randint(4, (400,), generator=generator)) for seed in (0, 1)
    )
    assert linear_probe(train, test, **SETTINGS).top1 == pytest.approx(0.25, abs=0.08)


def test_the_rate_is_chosen_without_the_test_samples():
    train, test = features(400, 0), features(200, 1)
    wrong = replace(test, labels=(test.labels + 1) % 4)
    right, fooled = linear_probe(train, test, **SETTINGS), linear_probe(train, wrong, **SETTINGS)
    assert (right.learning_rate, right.sweep) == (fooled.learning_rate, fooled.sweep)
    assert right.learning_rate == max(right.sweep, key=right.sweep.get)
    assert fooled.top1 < 0.3 < right.top1


@pytest.mark.parametrize("value", [0.0, 0.1, 100.0])
def test_a_feature_that_is_constant_in_training_decides_nothing(value):
    train, test = features(400, 0), features(200, 1)
    here = torch.full((400, 1), value)
    there = torch.linspace(-50, 50, 200)[:, None]  # a dead unit that comes alive on test images
    wider = (
        replace(train, features=torch.cat([train.features, here], 1)),
        replace(test, features=torch.cat([test.features, there], 1)),
    )
    assert linear_probe(*wider, **SETTINGS).top1 == linear_probe(train, test, **SETTINGS).top1


def test_a_rate_that_diverges_is_not_chosen_and_alone_is_an_error():
    train, test = features(400, 0), features(200, 1)
    result = linear_probe(train, test, **{**SETTINGS, "learning_rates": [0.1, 1e38]})
    assert result.learning_rate == 0.1 and result.sweep[1e38] == 0.0
    with pytest.raises(InputError, match="diverged at learning rate 1e"):
        linear_probe(train, test, **{**SETTINGS, "learning_rates": [1e38]})


def test_no_samples_is_an_error():
    with pytest.raises(InputError, match="1 labelled training image; needs at least 2"):
        linear_probe(features(1, 0), features(10, 1), **SETTINGS)
