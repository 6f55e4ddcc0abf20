"""Semantic deduplication within a cluster: of images that an embedding cannot tell apart, one is kept.

    for x in images, the farthest from the centroid first (ties: the smaller number):
        keep x unless its cosine to one that is kept already is at least 1 - epsilon

"SemDeDup" (Abbas et al., 2023), which also drops an image for the sake of a dropped one. Images are compared block by
block, so that memory holds no matrix of a whole cluster with itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_BLOCK, _COLUMNS = 1024, 8192
"""Images that are decided on together, and kept ones that they are compared with at a time."""


@dataclass(frozen=True)
class Duplicates:
    """Which images of a cluster are dropped.

    Attributes:
        of: place of the kept image that is nearest to a dropped one, int64 [n]; -1 for a kept image.
        cosines: to that image, float32 [n]; 0 for a kept image.
    """

    of: np.ndarray
    cosines: np.ndarray


@torch.no_grad()
def find_duplicates(rows: Tensor, centroid: Tensor, epsilon: float) -> Duplicates:
    """Find what is to be dropped. Collectives: none.

    Args:
        rows: images of a cluster in the order of their numbers, of length 1, float32 [n, D].
        centroid: [D].
        epsilon: images of a cosine of 1 - epsilon or more are the same.
    """
    order = torch.argsort(_cosines(rows, centroid), stable=True)  # the smallest cosine is the farthest
    ordered = rows[order]
    kept = _kept(ordered, 1 - epsilon)
    dropped = np.flatnonzero(~kept)
    of, cosines = np.full(len(rows), -1, np.int64), np.zeros(len(rows), np.float32)
    if len(dropped):
        those = torch.from_numpy(np.flatnonzero(kept)).to(rows.device)
        ours = torch.from_numpy(dropped).to(rows.device)
        bank = ordered[those]
        for some in ours.split(_BLOCK):
            best, place = _nearest(ordered[some], bank)
            at = order[some].cpu().numpy()
            of[at], cosines[at] = order[those[place]].cpu().numpy(), best.cpu().numpy()
    return Duplicates(of, cosines)


def _cosines(rows: Tensor, centroid: Tensor) -> Tensor:
    """By sums in float64: a matrix product may give copies of a row different last bits, and so an order."""
    parts = [(some.double() * centroid.double()).sum(1).float() for some in rows.split(_BLOCK)]
    return torch.cat(parts) if parts else rows.new_empty(0)


def _kept(ordered: Tensor, least: float) -> np.ndarray:
    kept = np.zeros(len(ordered), bool)
    bank = torch.empty_like(ordered)  # of kept images, filled from the start
    num = 0
    for start in range(0, len(ordered), _BLOCK):
        block = ordered[start : start + _BLOCK]
        free = np.ones(len(block), bool)
        if num:
            free = (_nearest(block, bank[:num])[0] < least).cpu().numpy()
        alike = ((block @ block.T) >= least).tril_(-1).cpu().numpy()
        for place in np.flatnonzero(alike.any(1) & free):
            free[place] = not (alike[place] & free).any()
        found = block[torch.from_numpy(free).to(block.device)]
        bank[num : num + len(found)] = found
        num += len(found)
        kept[start : start + len(block)] = free
    return kept


def _nearest(rows: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """The largest cosine of each row to the bank's, and where: the first of equal ones."""
    best = rows.new_full((len(rows),), -torch.inf)
    place = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for start in range(0, len(bank), _COLUMNS):
        found, where = (rows @ bank[start : start + _COLUMNS].T).max(1)
        better = found > best
        best, place = torch.where(better, found, best), torch.where(better, where + start, place)
    return best, place


def working_bytes(num: int, width: int) -> int:
    """Most bytes that `find_duplicates` holds at a time, with the rows."""
    return 4 * (3 * num * width + 2 * _BLOCK * (_COLUMNS + width))
