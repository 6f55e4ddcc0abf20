"""Losses in which an anchor picks its partner among candidates: logits, and what follows from them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from largescale.methods.losses.log_sum import log_sum_exp
from largescale.methods.losses.over_ranks import Group, gathered, own_places


class Picks(NamedTuple):
    """N anchors. Each picks once per partner, from that one and all wrong candidates.

    Attributes:
        right: logits of its partners [N, P].
        rest: logarithm of the sum of the exponentials of its wrong candidates' logits [N].
        best: the largest of these logits [N].
    """

    right: Tensor
    rest: Tensor
    best: Tensor

    @classmethod
    def of(cls, right: Tensor, wrong: Tensor) -> Picks:
        """From logits of partners [N, P] and of wrong candidates [N, C]; -inf where one is no candidate."""
        return cls(right, wrong.logsumexp(1), wrong.detach().amax(1))

    def losses(self) -> Tensor:
        """The cross-entropy of each pick [N, P]; no logit is too large for it."""
        return torch.logaddexp(self.right, self.rest[:, None]) - self.right

    def loss(self) -> Tensor:
        """The mean cross-entropy of all picks, a scalar."""
        return self.losses().mean()

    @torch.no_grad()
    def picked(self) -> Tensor:
        """The share of picks in which the partner is nearer than all wrong candidates, a scalar."""
        return (self.right > self.best[:, None]).to(self.right.dtype).mean()


def among_others(queries: Tensor, keys: Tensor, others: Tensor, temperature: float) -> Picks:
    """Queries that pick the key of their image among it and others that all of them share.

    Args:
        queries: unit vectors [V * B, D], view after view.
        keys: unit vectors [B, D] of the same images.
        others: unit vectors [K, D]. Those that take no gradient, as of a queue, cost no memory for their logits.
        temperature: divides cosines.
    """
    with torch.autocast(queries.device.type, enabled=False):
        right = (queries.view(-1, *keys.shape) * keys).sum(-1).view(-1, 1) / temperature
        if others.requires_grad:
            return Picks.of(right, queries @ others.T / temperature)
        return Picks(right, *log_sum_exp(queries / temperature, others))


def among_batch(queries: Tensor, keys: Tensor, temperature: float, group: Group) -> Picks:
    """Queries that pick the key of their image among the keys of all images of the ranks' batches.

    Args:
        queries: unit vectors [V * B, D], view after view.
        keys: unit vectors [B, D] of the same images.
        temperature: divides cosines.
        group: ranks with other images.

    Collectives: those of `gather_rows`, once, for the keys.
    """
    return among_gathered(queries, gathered(keys, group), own_places(len(keys), group, keys.device), temperature)


def among_gathered(queries: Tensor, keys: Tensor, partners: Tensor, temperature: float) -> Picks:
    """Queries that pick the key of their image among keys gathered before.

    Args:
        queries: unit vectors [V * B, D], view after view.
        keys: unit vectors [M, D].
        partners: where the keys of the B images are, int64 [B].
        temperature: divides cosines.
    """
    with torch.autocast(queries.device.type, enabled=False):
        logits = queries @ keys.T / temperature
        right = partners.repeat(len(queries) // len(partners))[:, None]
        return Picks.of(logits.gather(1, right), logits.scatter(1, right, -math.inf))


def among_views(views: Tensor, temperature: float, group: Group) -> Picks:
    """Views that pick each other view of their image among it and all views of other images.

    Args:
        views: unit vectors [V, B, D].
        temperature: divides cosines.
        group: ranks with other images.

    Collectives: those of `gather_rows`, once, for the views.
    """
    num_views, num = views.shape[:2]
    rows = views.flatten(0, 1)
    with torch.autocast(views.device.type, enabled=False):
        logits = rows @ gathered(rows, group).T / temperature
        places = own_places(len(rows), group, views.device).view(num_views, num)
        view = torch.arange(num_views, device=views.device)
        # Where the views of each row's image are among the gathered ones, [V * B, V], itself first.
        of_image = places[(view[:, None] + view) % num_views].transpose(1, 2).flatten(0, 1)
        return Picks.of(logits.gather(1, of_image[:, 1:]), logits.scatter(1, of_image, -math.inf))
