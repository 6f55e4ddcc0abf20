"""Views of images for measures without labels are those that training makes of them.

Covers: largescale/evaluate/without_labels.py
"""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
import torch

from largescale.config import load_config
from largescale.data.corpora import open_corpus
from largescale.data.stream import Stream
from largescale.evaluate import views
from largescale.evaluate.views import features_of_views
from shards.ground.errors import InputError
from tests.helpers.commands import TINY

CPU = torch.device("cpu")


def flat(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)


def test_views_are_those_of_the_training(shard_folder, monkeypatch):
    monkeypatch.setattr(views, "_EPOCH", 0)
    config = load_config(TINY, [f"data.shards={shard_folder}", "evaluate.batch=10"])
    stream = Stream(config, rank=0, world_size=1, device=CPU, dtype=torch.float32)
    with closing(stream(range(1))) as batches:
        batch = next(iter(batches))
        expected, ids = batch.views[0].clone().unflatten(0, (2, 16)), batch.ids.numpy()
    order = np.argsort(ids)
    found = features_of_views(open_corpus(str(shard_folder), config.data), config, {"flat": flat}, ids[order], 2, CPU)
    assert torch.equal(found["flat"], expected.flatten(2)[:, order])  # in batches of five, the last of them of one


def test_views_differ_from_each_other_and_not_from_one_call_to_the_next(shard_folder):
    config = load_config(TINY, [f"data.shards={shard_folder}", "evaluate.batch=8"])
    corpus, ids = open_corpus(str(shard_folder), config.data), np.arange(7)
    first, again = (features_of_views(corpus, config, {"flat": flat}, ids, 3, CPU)["flat"] for _ in range(2))
    assert first.shape == (3, 7, 3 * 28 * 28) and torch.equal(first, again)
    assert all((first[a] - first[b]).abs().amax(1).min() > 0.1 for a in range(3) for b in range(a))


def test_features_that_are_not_numbers_are_refused(shard_folder):
    config = load_config(TINY, [f"data.shards={shard_folder}"])
    broken = {"broken": lambda images: flat(images) / 0}
    with pytest.raises(InputError, match="features of the broken network are not finite on 6 of 6 images"):
        features_of_views(open_corpus(str(shard_folder), config.data), config, broken, np.arange(3), 2, CPU)
