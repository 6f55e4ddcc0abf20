from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from largescale.evaluate import knn
from largescale.evaluate.feature_set import FeatureSet
from shards.ground.errors import InputError
from tests.helpers.features import CLASSES, features


def brute_force(train: FeatureSet, test: FeatureSet, k: int, temperature: float) -> float:
    """The definition, in float64, one query at a time."""
    bank = train.features.double().numpy()
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    right = 0
    for query, label in zip(test.features.double().numpy(), test.labels.tolist(), strict=True):
        cosines = bank @ (query / np.linalg.norm(query))
        votes = np.zeros(len(CLASSES))
        for row in np.argsort(-cosines)[:k]:
            votes[int(train.labels[row])] += np.exp(cosines[row] / temperature)
        right += int(votes.argmax() == label)
    return right / len(test)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_brute_force_for_every_k(temperature):
    train, test = features(300, 0), features(80, 1)
    found = knn.knn_accuracy(train, test, num_neighbours=[1, 5, 20, 300], temperature=temperature)
    assert found == {k: brute_force(train, test, k, temperature) for k in (1, 5, 20, 300)}
    assert 0.3 < found[20] < 0.99  # neither trivial nor hopeless, or the comparison would say little


def test_chunks_of_bank_and_queries_change_nothing(monkeypatch):
    train, test = features(300, 0), features(80, 1)
    whole = knn.nearest(train.features, test.features, 20)
    monkeypatch.setattr(knn, "_BANK_CHUNK", 7)
    monkeypatch.setattr(knn, "_QUERY_CHUNK", 11)
    chunked = knn.nearest(train.features, test.features, 20)
    torch.testing.assert_close(chunked[0], whole[0])
    assert torch.equal(chunked[1], whole[1])


@pytest.mark.parametrize("k", [0, 31])
def test_k_must_fit_the_bank(k):
    with pytest.raises(InputError, match="expected 1 to 30"):
        knn.nearest(torch.randn(30, 4), torch.randn(2, 4), k)


@pytest.mark.parametrize("temperature", [0.07, 0.01, 0.001, 1e-5])
def test_votes_equal_logsumexp_in_float64_at_every_temperature(temperature):
    train, test = features(300, 0, spread=3.0), features(200, 1, spread=3.0)
    cosines = normalize(test.features, dim=1).double() @ normalize(train.features, dim=1).double().T
    best, rows = cosines.topk(20, dim=1)
    votes = torch.full((200, 20, 4), -torch.inf, dtype=torch.float64)
    votes.scatter_(2, train.labels[rows][..., None], (best / temperature)[..., None])
    expected = float((votes.logsumexp(1).argmax(1) == test.labels).double().mean())
    found = knn.knn_accuracy(train, test, num_neighbours=[20], temperature=temperature)[20]
    assert found == pytest.approx(expected, abs=1 / 200)  # one image whose classes tie in float32
    if temperature == 1e-5:  # then the nearest decides alone
        assert found == float((train.labels[rows[:, 0]] == test.labels).double().mean())


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(InputError, match="knn_temperature=0"):
        knn.knn_accuracy(features(30, 0), features(5, 1), num_neighbours=[3], temperature=0)


def test_faiss_finds_the_same_neighbours():
    pytest.importorskip("faiss")
    train, test = features(300, 0), features(80, 1)
    cosines, rows = knn.nearest(train.features, test.features, 20)
    theirs, their_rows = knn.nearest_by_faiss(train.features, test.features, 20)
    torch.testing.assert_close(theirs, cosines)
    assert torch.equal(their_rows, rows)
    found = [knn.measure(train, test, knn.Settings(knn_search=name)) for name in ("torch", "faiss")]
    assert found[0] == found[1]
    with pytest.raises(InputError, match="expected 1 to 300"):
        knn.nearest_by_faiss(train.features, test.features, 301)


def test_faiss_that_is_not_installed_is_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"evaluate.knn_search=faiss: faiss is not installed; pip install faiss-cpu"):
        knn.measure(features(30, 0), features(8, 1), knn.Settings(knn_search="faiss"))
