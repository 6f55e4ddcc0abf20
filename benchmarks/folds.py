"""How good features are on the images that a network was trained on: recipes are compared without any other image.

    python -m benchmarks.folds RUN [RUN ...]

Labelled images of data.shards in five parts: each is classified by the four others, by kNN (k = 20, T = 0.07) and by
logistic regression on standardised features (L2 0.001, L-BFGS). More exact than a fifth held out, since all images
count; but the network saw all of them, without labels, and what it learnt of just these is rewarded: longer training
looks better here than it is on others (benchmarks/results/demo_choices.md).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from largescale.checkpoint.folder import newest_first
from largescale.config import load_config
from largescale.data.corpora import open_corpora
from largescale.evaluate.extract import extract, load_method, pixels
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.knn import knn_accuracy

FOLDS, SEED, L2 = 5, 7, 1e-3


def folds(found: FeatureSet) -> Iterator[tuple[FeatureSet, FeatureSet]]:
    """Four parts and the fifth, of each; the same for all runs on the same images."""
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(SEED))
    for first in range(FOLDS):
        is_fifth = torch.zeros(len(found), dtype=torch.bool)
        is_fifth[order[first::FOLDS]] = True
        yield _part(found, ~is_fifth), _part(found, is_fifth)


def linear(train: FeatureSet, test: FeatureSet) -> float:
    """Share of the test images that a logistic regression on the training images tells right."""
    mean, deviation = train.features.mean(0), train.features.std(0).clamp_min(1e-6)
    x, y = (pad((one.features - mean) / deviation, (0, 1), value=1.0) for one in (train, test))
    weights = torch.zeros(x.shape[1], len(train.classes), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(x @ weights, train.labels) + L2 * weights.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return float(((y @ weights).argmax(1) == test.labels).double().mean())


def accuracies(run: Path) -> dict[str, tuple[float, float]]:
    """kNN and linear accuracy in percent, of the run's newest checkpoint and of pixels."""
    config = load_config(run / "config.yaml")
    checkpoint = newest_first(run / "checkpoints")[0]
    networks = {"pretrained": load_method(config, checkpoint).encode, "pixels": pixels}
    [corpus] = open_corpora(config.data)
    found = extract(corpus, config, networks, torch.device("cpu"))
    means = {}
    for name, features in found.items():
        pairs = list(folds(features))
        knn = [knn_accuracy(*pair, num_neighbours=[20], temperature=0.07)[20] for pair in pairs]
        means[name] = 100 * statistics.mean(knn), 100 * statistics.mean(linear(*pair) for pair in pairs)
    return means


def _part(found: FeatureSet, rows: Tensor) -> FeatureSet:
    return replace(found, features=found.features[rows], labels=found.labels[rows], ids=found.ids[rows])


def main() -> None:
    """Print a line for each run and network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+")
    for run in parser.parse_args().runs:
        for name, (knn, probe) in accuracies(run).items():
            print(f"{run}: {name}: {knn:.2f} kNN, {probe:.2f} linear", flush=True)


if __name__ == "__main__":
    main()
