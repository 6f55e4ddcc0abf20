"""Multinomial logistic regression with many L2 strengths at once: full-batch L-BFGS, one batched product for all.

    minimise over W, b:  mean cross-entropy(x @ W + b, labels) + strength / 2 * |W|^2

The objective is convex, so it has one answer whatever the number of ranks, the batch or the order, and no learning rate
to choose. Strengths share each pass over the features; each has its own curvature and its own step length. Features
are rotated to their principal axes, which leaves the objective as it is and makes its curvature nearly diagonal: L-BFGS
that starts from this diagonal needs a few dozen steps instead of hundreds.
Weights, gradients and sums are float64, features are widened block by block: then sums over ranks differ by rounding of
1e-16, which decides no image. Algorithm: Nocedal & Wright, Numerical Optimization, 7.4 (L-BFGS), with backtracking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from largescale.evaluate.shares import own_rows, total
from largescale.processes import rank

_MEMORY = 10
"""Steps that the curvature is estimated from."""
_BLOCK_BYTES = 2**28
"""Of float64 features and scores at a time."""
_DECREASE = 1e-4
_HALVINGS = 30


@dataclass(frozen=True)
class Standardiser:
    """Brings features to mean 0 and variance 1 as they are on the training samples; constant ones become 0. Then
    rotates them to their principal axes there.

    Attributes:
        mean, scale: float64 [D].
        axes: float64 [D, D].
        variances: along the axes, float64 [D].
    """

    mean: Tensor
    scale: Tensor
    axes: Tensor
    variances: Tensor

    @staticmethod
    def of(features: Tensor) -> Standardiser:
        """That of training features [N, D]."""
        blocks = features.split(max(1, _BLOCK_BYTES // (8 * features.shape[1])))
        mean = torch.stack([block.double().sum(0) for block in blocks]).sum(0) / len(features)
        squares = torch.stack([(block.double() - mean).square().sum(0) for block in blocks]).sum(0)
        std = (squares / max(1, len(features) - 1)).sqrt()
        # What is left of a constant is the rounding error of its mean; dividing by that would make it larger than all
        # that can be learned from.
        constant = std <= torch.finfo(torch.float32).eps * mean.abs()
        scale = torch.where(constant, 0.0, 1 / std)
        products = torch.zeros(len(mean), len(mean), dtype=torch.float64)
        for block in blocks:
            standard = (block.double() - mean) * scale
            products.addmm_(standard.T, standard)
        variances, axes = torch.linalg.eigh(products / len(features))
        return Standardiser(mean, scale, axes, variances.clamp_min(0))

    def on(self, device: torch.device) -> Standardiser:
        """The same on a device."""
        return Standardiser(*(value.to(device) for value in (self.mean, self.scale, self.axes, self.variances)))

    def __call__(self, features: Tensor) -> Tensor:
        """Features [B, D], on its device, in float64, with a last column of ones for the bias: [B, D + 1]."""
        standard = (features.double() - self.mean) * self.scale @ self.axes
        return torch.cat([standard, standard.new_ones(len(standard), 1)], dim=1)


@dataclass(frozen=True)
class Classifiers:
    """One linear classifier per strength.

    Attributes:
        weights: float64 [S, D + 1, C], the bias last, for standardised features.
        standardiser: of the training features.
        steps: of L-BFGS that were made.
        converged: bool [S].
    """

    weights: Tensor
    standardiser: Standardiser
    steps: int
    converged: Tensor

    def num_right(self, features: Tensor, labels: Tensor, top: int = 1) -> Tensor:
        """How many samples [N] have their label among the `top` largest scores: int64 [S]; collectives as of `hits`."""
        return self.hits(features, labels, top).sum(1)

    def hits(self, features: Tensor, labels: Tensor, top: int = 1) -> Tensor:
        """Which samples [N] have their label among the `top` largest scores: bool [S, N].

        Collectives: every rank must call it with the same samples; one all-reduce.
        """
        strengths, width, num_classes = self.weights.shape
        hits = torch.zeros(strengths, len(labels), dtype=torch.bool)
        own, standardiser = own_rows(len(labels)), self.standardiser.on(self.weights.device)
        for rows in own.split(_rows_at_a_time(width, strengths * num_classes)):
            x = standardiser(features[rows].to(self.weights.device))
            best = torch.einsum("nd,sdc->snc", x, self.weights).topk(min(top, num_classes), dim=2).indices.cpu()
            hits[:, rows] = (best == labels[rows][None, :, None]).any(2)
        return total(hits) > 0


def fit(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    strengths: Sequence[float],
    *,
    max_steps: int = 300,
    tolerance: float = 1e-8,
    said: str = "",
) -> Classifiers:
    """Fit a classifier per strength on standardised features.

    Args:
        features: [N, D], of all training samples on every rank.
        labels: int64 [N].
        strengths: of the L2 penalty, above 0.
        max_steps: L-BFGS steps.
        tolerance: a strength is done when its loss is estimated to be within this of the lowest.
        said: what a bar of the steps calls them; empty shows none.

    Collectives: every rank must call it with the same arguments; one all-reduce per evaluation of the objective.
    """
    standardiser = Standardiser.of(features)
    objective = _Objective(features, labels, num_classes, torch.tensor(strengths, dtype=torch.float64), standardiser)
    with tqdm(
        total=max_steps, desc=said, unit="step", leave=False, mininterval=1, disable=not said or rank() > 0
    ) as bar:
        weights, steps, converged = _minimise(objective, max_steps, tolerance, bar.update)
    return Classifiers(weights, standardiser, steps, converged)


class _Objective:
    """Loss [S] and gradient [S, D + 1, C] at weights of some strengths."""

    def __init__(
        self, features: Tensor, labels: Tensor, num_classes: int, strengths: Tensor, standardiser: Standardiser
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        own = own_rows(len(labels))
        self.features, self.labels = features[own], labels[own]
        self.standardiser = standardiser.on(self.device)  # its rotation is most of the work of a pass
        self.num_samples, self.strengths = len(labels), strengths.to(self.device)
        self.shape = len(strengths), features.shape[1] + 1, num_classes
        # The curvature at the start, where all classes are equally likely; 1 for the bias.
        variances = torch.cat([standardiser.variances, torch.ones(1, dtype=torch.float64)]).to(self.device)
        self.curvature = (variances * (num_classes - 1) / num_classes**2 + self.strengths[:, None])[:, :, None]
        # Kept in float64 where that is small; widened again in every pass otherwise.
        kept = len(own) * self.shape[1] * 8 <= _BLOCK_BYTES
        self._standard = self.standardiser(self.features.to(self.device)) if kept else None

    def __call__(self, weights: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        num_strengths, width, num_classes = weights.shape
        strengths = self.strengths[chosen]
        loss = weights.new_zeros(num_strengths)
        gradient = weights.new_zeros(width, num_strengths * num_classes)
        wide = weights.transpose(0, 1).reshape(width, -1)  # one matrix for all strengths: a pass is two products
        for rows in torch.arange(len(self.labels)).split(_rows_at_a_time(width, wide.shape[1])):
            if not len(rows):  # this rank has none
                continue
            x = self._rows(rows)
            scores = (x @ wide).view(len(rows), num_strengths, num_classes)
            log_shares = scores.log_softmax(2)
            target = self.labels[rows].to(self.device)
            loss -= log_shares.gather(2, target[:, None, None].expand(-1, num_strengths, 1)).sum((0, 2))
            error = log_shares.exp_()
            error[torch.arange(len(rows), device=self.device), :, target] -= 1
            gradient.addmm_(x.T, error.flatten(1))
        sums = total(torch.cat([loss, gradient.flatten()])).to(self.device) / self.num_samples
        loss, gradient = sums[:num_strengths], sums[num_strengths:].view(width, num_strengths, num_classes)
        penalised = weights.clone()
        penalised[:, -1] = 0  # the bias is free
        loss = loss + 0.5 * strengths * penalised.square().sum((1, 2))
        return loss, gradient.transpose(0, 1) + strengths[:, None, None] * penalised

    def _rows(self, rows: Tensor) -> Tensor:
        if self._standard is not None:
            return self._standard[rows[0] : rows[-1] + 1]
        return self.standardiser(self.features[rows].to(self.device))


def _rows_at_a_time(width: int, num_scores: int) -> int:
    return max(1, _BLOCK_BYTES // (8 * (width + 2 * num_scores)))


def _minimise(
    objective: _Objective, max_steps: int, tolerance: float, done: Callable[[], object]
) -> tuple[Tensor, int, Tensor]:
    """L-BFGS from 0, all strengths side by side: weights [S, D + 1, C], steps made, and which converged [S]. `done` is
    called after each step.
    """
    found = torch.zeros(objective.shape, dtype=torch.float64, device=objective.device)
    left = torch.arange(len(found), device=objective.device)  # strengths that are not done
    weights = found.clone()
    loss, gradient = objective(weights, left)
    memory: list[tuple[Tensor, Tensor]] = []
    for step in range(max_steps):
        direction = _direction(gradient, memory, objective.curvature[left])
        excess = -_dot(gradient, direction) / 2  # half of Newton's decrement
        found[left] = weights
        going = excess > tolerance
        if not going.all():  # those that are done cost no more passes
            left, weights, loss, gradient, direction = (
                part[going] for part in (left, weights, loss, gradient, direction)
            )
            memory = [(moved[going], changed[going]) for moved, changed in memory]
        if len(left) == 0:
            return found, step, torch.ones(len(found), dtype=torch.bool)
        move, loss, new_gradient = _searched(objective, left, weights, loss, gradient, direction)
        memory = [*memory[-_MEMORY + 1 :], (move, new_gradient - gradient)]
        weights, gradient = weights + move, new_gradient
        done()
    found[left] = weights
    converged = torch.ones(len(found), dtype=torch.bool)
    converged[left.cpu()] = False
    return found, max_steps, converged


def _searched(
    objective: _Objective, left: Tensor, weights: Tensor, loss: Tensor, gradient: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A move along the direction that lowers each strength's loss enough, its loss and its gradient there."""
    slope, length = _dot(gradient, direction), torch.ones_like(loss)
    for _ in range(_HALVINGS):
        move = length[:, None, None] * direction
        new_loss, new_gradient = objective(weights + move, left)
        too_long = new_loss > loss + _DECREASE * length * slope
        if not too_long.any():
            break
        length = torch.where(too_long, length / 2, length)
    else:
        move, new_loss, new_gradient = _undone(too_long, move, (new_loss, loss), (new_gradient, gradient))
    return move, new_loss, new_gradient


def _undone(
    undo: Tensor, move: Tensor, losses: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Strengths that no step improves stay where they are."""
    whole = undo[:, None, None]
    return (
        torch.where(whole, torch.zeros_like(move), move),
        torch.where(undo, losses[1], losses[0]),
        torch.where(whole, gradients[1], gradients[0]),
    )


def _direction(gradient: Tensor, memory: list[tuple[Tensor, Tensor]], curvature: Tensor) -> Tensor:
    """The two-loop recursion for each strength: minus the gradient, scaled by the estimated inverse curvature, which
    starts from a given diagonal.
    """
    direction, factors = -gradient, []
    for moved, changed in reversed(memory):
        inverse = _inverse(_dot(moved, changed))
        factor = inverse * _dot(moved, direction)
        direction = direction - factor[:, None, None] * changed
        factors.append((moved, changed, inverse, factor))
    direction = direction / curvature
    if memory:
        moved, changed = memory[-1]
        scale = _dot(moved, changed) * _inverse(_dot(changed, changed / curvature))
        direction = direction * torch.where(scale > 0, scale, torch.ones_like(scale))[:, None, None]
    for moved, changed, inverse, factor in reversed(factors):
        back = inverse * _dot(changed, direction)
        direction = direction + (factor - back)[:, None, None] * moved
    return direction


def _inverse(product: Tensor) -> Tensor:
    """1 / product where it is above 0; 0 where a strength did not move, so that the pair says nothing of it."""
    return torch.where(product > 0, 1 / product, torch.zeros_like(product))


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum((1, 2))
