"""Linear probe: a linear classifier on frozen features, its learning rate chosen without the test samples.

The standard protocol (SwAV, arXiv 2006.09882, section 4): SGD with momentum and a cosine schedule. Features are
standardised first, as a BatchNorm without parameters in front of the classifier would. All rates of the sweep train
at once as one batched matrix; the rate is chosen on a tenth of the training samples that is held out for it, and the
quoted accuracy comes from a classifier trained on all of them with that rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from largescale.config import EvaluateConfig
from largescale.config.setting import setting
from largescale.evaluate.feature_set import FeatureSet
from shards.ground.errors import InputError

CHOSEN_ON = "a tenth of the training images"

_HELD_OUT = 0.1
_MOMENTUM = 0.9


@dataclass
class Settings(EvaluateConfig):
    """Keys under `evaluate`."""

    linear_epochs: int = setting(100, "Epochs of the linear probe.", at_least=1, at_most=10**6, free=True)
    linear_batch: int = setting(512, "Images per step of the linear probe.", at_least=1, at_most=2**31, free=True)
    linear_rates: list[float] = setting(
        [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0],
        "Learning rates the linear probe tries.",
        above=0,
        at_most=1e9,
        min_length=1,
        free=True,
    )
    linear_weight_decay: float = setting(0.0, "Weight decay of the linear probe.", at_least=0, at_most=1e6, free=True)


def measure(train: FeatureSet, test: FeatureSet, config: Settings) -> dict[str, Any]:
    """Top-1 (and top-5) accuracy of the probe; ranks do the same, since its steps are small."""
    result = linear_probe(
        train,
        test,
        learning_rates=config.linear_rates,
        epochs=config.linear_epochs,
        batch_size=config.linear_batch,
        weight_decay=config.linear_weight_decay,
        seed=0,
    )
    return {
        "top1": result.top1,
        "top5": result.top5,
        "learning_rate": result.learning_rate,
        "sweep": {str(rate): accuracy for rate, accuracy in result.sweep.items()},
        "hits": result.hits.tolist(),
    }


@dataclass(frozen=True)
class LinearResult:
    """Accuracies as shares: on the test samples, and of each learning rate on the held-out training samples.

    Attributes:
        hits: test samples that are classified correctly, bool [N].
    """

    top1: float
    top5: float | None
    learning_rate: float
    sweep: dict[float, float]
    hits: Tensor


def linear_probe(
    train: FeatureSet,
    test: FeatureSet,
    *,
    learning_rates: Sequence[float],
    epochs: int,
    batch_size: int,
    weight_decay: float,
    seed: int,
) -> LinearResult:
    """Choose a learning rate on held-out training samples, train with it on all, measure on the test samples.

    Raises:
        InputError: fewer than two training samples or no learning rate.
    """
    if len(train) < 2:
        raise InputError(f"linear: {len(train)} labelled training image; needs at least 2")
    if not learning_rates:
        raise InputError("evaluate.linear_rates=[]: expected at least one learning rate")
    generator = torch.Generator().manual_seed(seed)
    x, x_test = _standardise(train.features, test.features)
    num_classes = len(train.classes)

    order = torch.randperm(len(train), generator=generator)
    held, fit = order.tensor_split([max(1, int(len(train) * _HELD_OUT))])
    trained = partial(_train, epochs=epochs, batch_size=batch_size, weight_decay=weight_decay, generator=generator)
    tried = trained(x[fit], train.labels[fit], num_classes, learning_rates)
    sweep = {rate: _share(x[held], train.labels[held], w, 1) for rate, w in zip(learning_rates, tried, strict=True)}

    rate = max(sweep, key=lambda candidate: sweep[candidate])
    weight = trained(x, train.labels, num_classes, [rate])[0]
    if not weight.isfinite().all():
        raise InputError(
            f"linear probe: diverged at learning rate {rate:g}, the best of evaluate.linear_rates="
            f"{list(learning_rates)}; add smaller ones"
        )
    top5 = _share(x_test, test.labels, weight, 5) if num_classes > 5 else None
    hits = _hits(x_test, test.labels, weight, 1)
    return LinearResult(float(hits.double().mean()), top5, rate, sweep, hits)


def _standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both with mean 0 and variance 1 on the training samples; a feature that is constant there becomes 0.

    Nothing can be learned from a constant, but dividing by the rounding error of its mean would make it, or its values
    on test samples, larger than all that was learned from.
    """
    mean, std = train.double().mean(0), train.double().std(0)
    constant = std <= torch.finfo(train.dtype).eps * mean.abs()
    scale = torch.where(constant, 0.0, 1 / std)
    return ((train.double() - mean) * scale).to(train.dtype), ((test.double() - mean) * scale).to(train.dtype)


def _train(
    x: Tensor,
    labels: Tensor,
    num_classes: int,
    rates: Sequence[float],
    *,
    epochs: int,
    batch_size: int,
    weight_decay: float,
    generator: torch.Generator,
) -> Tensor:
    """Train one classifier a learning rate, all on the same batches: weights [R, D + 1, C], the bias last."""
    num_samples, width = x.shape
    x = torch.cat([x, x.new_ones(num_samples, 1)], dim=1)
    # One wide matrix for all rates, so that a step is two products whatever their number.
    weights = x.new_zeros(width + 1, len(rates) * num_classes)
    momenta = torch.zeros_like(weights)
    rate = torch.tensor(rates).repeat_interleave(num_classes)
    batch_size = min(batch_size, max(1, num_samples // 4))  # few samples still get some updates per epoch
    steps_per_epoch = num_samples // batch_size
    for epoch in range(epochs):
        order = torch.randperm(num_samples, generator=generator)
        for step, rows in enumerate(order.split(batch_size)[:steps_per_epoch]):
            batch = x[rows]
            # Gradient of the cross-entropy: probabilities less the target.
            error = torch.softmax((batch @ weights).view(len(rows), len(rates), num_classes), dim=-1)
            error[torch.arange(len(rows)), :, labels[rows]] -= 1
            gradient = batch.T @ (error.flatten(1) / len(rows)) + weight_decay * weights
            momenta.mul_(_MOMENTUM).add_(gradient)
            progress = (epoch + step / steps_per_epoch) / epochs
            weights -= rate * (0.5 * (1 + math.cos(math.pi * progress))) * momenta
    return weights.view(width + 1, len(rates), num_classes).transpose(0, 1)


def _share(x: Tensor, labels: Tensor, weight: Tensor, k: int) -> float:
    return float(_hits(x, labels, weight, k).double().mean())


def _hits(x: Tensor, labels: Tensor, weight: Tensor, k: int) -> Tensor:
    if not weight.isfinite().all():
        return torch.zeros(len(labels), dtype=torch.bool)  # diverged: the largest of NaNs means nothing
    scores = x @ weight[:-1] + weight[-1]
    return (scores.topk(k, dim=1).indices == labels[:, None]).any(1)
