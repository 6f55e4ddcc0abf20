"""Principal components of the features of all ranks, whitened, as unit vectors.

    x = features - their mean;  V, s = eigenvectors and eigenvalues of x^T x / N, the N largest
    y = x V / sqrt(s);          y / |y|

Sums are in float64, each rank's its own in blocks; so results for other numbers of ranks differ by rounding, about
1e-15 of the largest variance. Directions of no variance (1e-10 of the largest) are left out.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from largescale.clustering.fixed_point import NotFinite
from largescale.processes import world_size

_BLOCK = 4096
_NONE = 1e-10


@torch.no_grad()
def whitened(features: Tensor, num_components: int) -> Tensor:
    """Unit vectors of whitened principal components, [n, C], in the features' type, at least float32.

    Args:
        features: of this rank, [n, F]; ranks may have different numbers.
        num_components: C; F of them if there are fewer.

    Raises:
        NotFinite: on all ranks, if features are not finite.

    Collectives: every rank must call it; all-reduces of F + 1 and F^2 numbers, a broadcast of F C.
    """
    width = features.shape[1]
    sums = torch.zeros(width + 1, dtype=torch.float64, device=features.device)
    for block in features.split(_BLOCK):
        sums[:-1] += block.double().sum(0)
    sums[-1] = len(features)
    _add_up(sums)
    if not bool(sums.isfinite().all()):
        raise NotFinite("features are not finite")
    mean = sums[:-1] / sums[-1].clamp_min(1)
    covariance = torch.zeros(width, width, dtype=torch.float64, device=features.device)
    for block in features.split(_BLOCK):
        centred = block.double() - mean
        covariance.addmm_(centred.T, centred)
    _add_up(covariance)
    projection = _projection(covariance / sums[-1].clamp_min(1), min(num_components, width))
    if world_size() > 1:
        dist.broadcast(projection, 0)  # eigenvectors have a sign each, which libraries are free to choose
    found = features.new_empty(
        len(features), projection.shape[1], dtype=torch.promote_types(features.dtype, torch.float32)
    )
    for block, own in zip(features.split(_BLOCK), found.split(_BLOCK), strict=True):
        own.copy_(normalize((block.double() - mean) @ projection, dim=1))
    return found


def _projection(covariance: Tensor, num_components: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues over the square roots of these, [F, C]."""
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0)[:num_components], vectors.flip(1)[:, :num_components]
    some = values > _NONE * values[0].clamp_min(torch.finfo(values.dtype).tiny)
    return (vectors * torch.where(some, values, 1).rsqrt() * some).contiguous()


def _add_up(numbers: Tensor) -> None:
    if world_size() > 1:
        dist.all_reduce(numbers)
