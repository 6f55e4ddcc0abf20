from __future__ import annotations

import pickle

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from largescale.config import load_config
from largescale.data.corpora import Corpus
from largescale.distributed import collectives
from largescale.evaluate.extract import extract
from largescale.evaluate.logistic_start import STRENGTH, start_from_logistic
from shards.format.manifest import read_manifest
from tests.helpers.commands import ROOT
from tests.helpers.ranks import run_ranks


def features_of(images: torch.Tensor) -> torch.Tensor:
    """Of images [B, 3, S, S]: 13 numbers of very different lengths, the last of which says nothing."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3 * 16 * 16, 12, generator=generator) * 10.0 ** torch.arange(-3, 9)
    return torch.cat([images.flatten(1) @ matrix, torch.ones(len(images), 1)], dim=1)


def test_the_classifier_is_logistic_regression_on_these_images(shard_folder):
    """Features are used as they are, while the penalty is of standardised ones: the gradient there is 0."""
    config = load_config(ROOT / "tests/tiny.yaml", [f"data.shards={shard_folder}"])
    config.evaluate.resize = config.evaluate.size = 16
    corpus, device, ids = Corpus(read_manifest(shard_folder)), torch.device("cpu"), np.arange(0, 200, 3)
    head = nn.Linear(13, 10)
    start_from_logistic(head, features_of, corpus, ids, config, device)
    known = extract(corpus, config, {"it": features_of}, device, ids=ids)["it"]
    assert known.ids.tolist() == ids.tolist() and bool((head.weight[:, 12] == 0).all())

    x = known.features[:, :12].double()
    mean, std = x.mean(0), x.std(0)
    weights = (head.weight.detach().double()[:, :12] * std).requires_grad_()
    bias = (head.bias.detach().double() + head.weight.detach().double()[:, :12] @ mean).requires_grad_()
    loss = cross_entropy((x - mean) / std @ weights.T + bias, known.labels)
    of_weights, of_bias = torch.autograd.grad(loss, [weights, bias])
    weights, bias = weights.detach(), bias.detach()
    assert float((of_weights + STRENGTH * weights).abs().max()) < 2e-4 < float(of_weights.abs().max())
    assert float(of_bias.abs().max()) < 2e-4


def started(folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a classifier that starts from some images of a folder."""
    config = load_config(ROOT / "tests/tiny.yaml", [f"data.shards={folder}"])
    config.evaluate.resize = config.evaluate.size = 16
    corpus, device = Corpus(read_manifest(folder)), torch.device("cpu")
    head = nn.Linear(13, 10)
    start_from_logistic(head, features_of, corpus, np.arange(0, 200, 3), config, device)
    return head.weight.detach(), head.bias.detach()


def started_on_ranks(folder: str) -> tuple[tuple[torch.Tensor, torch.Tensor], int]:
    """The same on several ranks, features in many pieces; and the bytes of the largest object that was broadcast."""
    sizes, original, collectives._PIECE = [], dist.broadcast_object_list, 100

    def counting(objects, *arguments, **options):
        original(objects, *arguments, **options)
        sizes.append(len(pickle.dumps(objects)))

    dist.broadcast_object_list = counting
    return started(folder), max(sizes)


def test_ranks_get_the_features_as_tensors_and_find_the_same_classifier(shard_folder):
    alone = started(str(shard_folder))
    (first, largest), (second, _) = run_ranks(started_on_ranks, 2, str(shard_folder))
    for mine, theirs, expected in zip(first, second, alone, strict=True):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-7)
    assert largest < 1000, "67 x 13 features alone are 3484 bytes"
