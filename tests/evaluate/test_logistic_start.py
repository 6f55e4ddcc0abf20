from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from largescale.config import load_config
from largescale.data.corpora import Corpus
from largescale.evaluate.extract import extract
from largescale.evaluate.logistic_start import STRENGTH, start_from_logistic
from shards.format.manifest import read_manifest
from tests.helpers.commands import ROOT


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
