"""How well embeddings rank others: recall of partners, and normalised discounted cumulative gain of classes.

Others are ranked by Euclidean distance, as by cosine where embeddings are unit vectors. Where several are equally near,
the figure is its mean over all their orders, as in scikit-learn's `ndcg_score` (McSherry and Najork, ECIR 2008):
embeddings that are all the same get just what chance gives. Squared distances that differ by less than a millionth of
the longest embedding's square, which may be rounding, count as equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from largescale.evaluate.shares import own_rows, total

_STEPS = 2.0**20
_NUMBERS_AT_A_TIME = 2**22
"""Of a block of queries by candidates, of which a few tables are held at once."""


def recall_of_partners(queries: Tensor, candidates: Tensor, ranks: Sequence[int]) -> list[float]:
    """Share of queries whose partner is among the k nearest candidates, by k; chance is k / N.

    Args:
        queries: [N, D].
        candidates: [N, D], of which row i is the partner of query i.
        ranks: values of k.

    Collectives: every rank must call it with the same rows; one all-reduce.
    """
    sums = torch.zeros(len(ranks), dtype=torch.float64)
    for rows, nearness in _blocks(queries, candidates):
        own = nearness.gather(1, rows[:, None])
        before, equal = (nearness > own).sum(1), (nearness == own).sum(1)
        for place, k in enumerate(ranks):
            sums[place] += ((k - before) / equal).clamp(0, 1).sum()
    return [float(one) for one in total(sums) / len(queries)]


@dataclass(frozen=True)
class Gain:
    """Normalised discounted cumulative gain, a mean over queries.

    Attributes:
        value: what was found; 1 is the best order.
        chance: its mean over all orders.
        num_queries: those that have anything relevant among the candidates.
    """

    value: float
    chance: float
    num_queries: int


def ndcg(queries: Tensor, candidates: Tensor, labels: Tensor, relevance: Tensor, k: int) -> Gain:
    """nDCG@k: the relevance of the k nearest, divided by log2(1 + place), over that in the best order.

        for query i: DCG = sum over p = 1 .. k of relevance[label of i, label of the p-th nearest] / log2(1 + p)

    The candidate in the query's own row is left out: it is the query itself, or its other half.

    Args:
        queries, candidates: [N, D], row by row of the same samples.
        labels: of the samples, int64 [N].
        relevance: of a class for queries of another one, at least 0, [C, C].
        k: places that count.

    Collectives: every rank must call it with the same rows; one all-reduce.
    """
    discounts = 1 / torch.arange(2, min(k, len(queries) - 1) + 2, dtype=torch.float64).log2()
    sums, relevance = torch.zeros(3, dtype=torch.float64), relevance.double()
    for rows, nearness in _blocks(queries, candidates):
        gains = relevance[labels[rows]][:, labels].scatter_(1, rows[:, None], 0.0)
        nearness.scatter_(1, rows[:, None], -5 * int(_STEPS))  # behind all others
        best = gains.topk(len(discounts), dim=1).values @ discounts
        counts = best > 0
        chance = gains.sum(1) / (len(queries) - 1) * discounts.sum()
        for place, found in enumerate((_discounted(nearness, gains, discounts), chance)):
            sums[place] += (found[counts] / best[counts]).sum()
        sums[2] += counts.sum()
    value, chance, num = total(sums).tolist()
    return Gain(value / num if num else 0.0, chance / num if num else 0.0, int(num))


def _discounted(nearness: Tensor, gains: Tensor, discounts: Tensor) -> Tensor:
    """DCG of rows, with the mean gain of its equals in the place of each candidate's."""
    nearness, order = nearness.sort(dim=1, descending=True)
    gains = gains.gather(1, order)
    number = (nearness.diff(dim=1) != 0).cumsum(1)
    number = torch.cat([number.new_zeros(len(number), 1), number], dim=1)  # of the equals that a place belongs to
    sums = torch.zeros_like(gains).scatter_add_(1, number, gains)
    sizes = torch.zeros_like(gains).scatter_add_(1, number, torch.ones_like(gains))
    places = number[:, : len(discounts)]
    return (sums.gather(1, places) / sizes.gather(1, places)) @ discounts


def _blocks(queries: Tensor, candidates: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's queries, some at a time: their rows, and how near candidates are, [b, N]: less squared distances as
    whole numbers of steps, from -4 * _STEPS to 0.
    """
    first, second = queries.double(), candidates.double()
    longest = torch.cat([first, second]).square().sum(1).max().sqrt().clamp_min(1e-30)
    first, second = first / longest, second / longest
    squares = second.square().sum(1)
    for rows in own_rows(len(first)).split(max(1, _NUMBERS_AT_A_TIME // max(1, len(second)))):
        some = first[rows]
        far = some.square().sum(1, keepdim=True) + squares - 2 * some @ second.T
        yield rows, (-far * _STEPS).round().long()
