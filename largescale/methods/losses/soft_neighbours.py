"""Classes by soft nearest neighbours among labelled images, and how predictions become targets (arXiv 2104.13963)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot


def soft_neighbours(queries: Tensor, supports: Tensor, classes: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Class probabilities of queries: each support votes with its own, weighted by its similarity.

    The naive loop, for unit vectors q and s::

        for i in queries:
            weights = [exp(q[i] @ s[n] / temperature) for n in supports]
            p[i] = sum(weights[n] * classes[n] for n in supports) / sum(weights)

    Args:
        queries: unit vectors [..., D].
        supports: unit vectors [S, D].
        classes: probabilities of each support's classes [S, K], such as `smoothed_classes`.
        temperature: divides cosines.

    Returns:
        [..., K], each row of sum 1.
    """
    return (queries @ supports.T / temperature).softmax(-1) @ classes


def smoothed_classes(labels: Tensor, num_classes: int, smoothing: float, dtype: torch.dtype) -> Tensor:
    """Probabilities [S, K] of labels int64 [S], of whose classes each gets `smoothing` / K, its own the rest too."""
    return one_hot(labels, num_classes).to(dtype) * (1 - smoothing) + smoothing / num_classes


def sharpened(probabilities: Tensor, temperature: float) -> Tensor:
    """Probabilities [..., K] to the power of 1 / temperature, of sum 1 again."""
    return (_log(probabilities) / temperature).softmax(-1)


def crossing_targets(large: Tensor, num_views: int) -> Tensor:
    """What each view is to predict: the mean of what is said of the image's other large views.

    Args:
        large: sharpened predictions of the large views [A, B, K], A at least 2.
        num_views: of each image, V; the first A are the large ones.

    Returns:
        [V, B, K]; with two large views each gets the other's, and a small view the mean of both.
    """
    total, num = large.sum(0), len(large)
    return torch.cat([(total - large) / (num - 1), (total / num).expand(num_views - num, -1, -1)])


def cross_entropy_of(targets: Tensor, probabilities: Tensor) -> Tensor:
    """The mean over rows of -sum_k targets log probabilities, both [..., K]."""
    return -(targets * _log(probabilities)).sum(-1).mean()


def entropy_of(probabilities: Tensor) -> Tensor:
    """Entropy in nats of rows [..., K]: [...]."""
    return -(probabilities * _log(probabilities)).sum(-1)


def _log(probabilities: Tensor) -> Tensor:
    """Their logarithm; of 0, which small temperatures bring about, that of the smallest number."""
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
