"""Classes by soft nearest neighbours among labelled images, and how predictions become targets (arXiv 2104.13963)."""

from __future__ import annotations

import math

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


def in_domain_neighbours(
    queries: Tensor,
    supports: Tensor,
    classes: Tensor,
    *,
    temperature: float = 0.1,
    label_ratio: float = 5.0,
    prior_temperature: float = 3.0,
) -> tuple[Tensor, Tensor]:
    """Class probabilities of unlabelled images of which some are of none of the classes (RoPAWS, arXiv 2302.14483).

    Images vote for each other too, by what the vote makes of them in turn, and a vote counts as much as the image seems
    to be of the domain: exp((largest cosine with a support - 1) / prior_temperature). What is left of it is spread over
    all classes. Iterated until it stands still, the naive loop::

        for i in queries:
            weights = [label_ratio * N / S * exp(q[i] @ s[n] / temperature) for n in supports]
            others = [exp(q[i] @ q[n] / temperature) for n in queries if n != i]
            p[i] = prior[i] * (weights @ classes + others @ p[queries except i]) / (sum(weights) + sum(others))

    Args:
        queries: unit vectors [N, D] of one view of each image of the batch.
        supports: unit vectors [S, D].
        classes: probabilities of each support's classes [S, K].
        temperature: divides cosines.
        label_ratio: weight of all supports over that of all queries.
        prior_temperature: a higher one takes more images for ones of the domain.

    Returns:
        Probabilities [N, K] of sum 1, and how likely each image is of the domain [N]: the sum before it was filled up.
    """
    similar = queries @ supports.T
    prior = ((similar.amax(1, keepdim=True) - 1) / prior_temperature).exp()
    ratio = math.log(label_ratio * len(queries) / len(supports))
    among = (queries @ queries.T / temperature).fill_diagonal_(-math.inf)
    votes = prior * torch.cat([similar / temperature + ratio, among], dim=1).softmax(1)
    of_supports, of_queries = votes.split([len(supports), len(queries)], dim=1)
    still = torch.eye(len(queries), dtype=votes.dtype, device=votes.device) - of_queries
    found = torch.linalg.solve(still, of_supports @ classes)
    in_domain = found.sum(1)
    return found + (1 - in_domain[:, None]) / classes.shape[1], in_domain


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


def cross_entropies(targets: Tensor, probabilities: Tensor) -> Tensor:
    """-sum_k targets log probabilities of rows, both [..., K]: [...]."""
    return -(targets * _log(probabilities)).sum(-1)


def entropy_of(probabilities: Tensor) -> Tensor:
    """Entropy in nats of rows [..., K]: [...]."""
    return cross_entropies(probabilities, probabilities)


def _log(probabilities: Tensor) -> Tensor:
    """Their logarithm; of 0, which small temperatures bring about, that of the smallest number."""
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
