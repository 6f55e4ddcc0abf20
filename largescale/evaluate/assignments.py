"""What the heads of a method assign images to: columns of a shard's file."""

from __future__ import annotations

import pyarrow as pa
import torch
from torch import Tensor

from largescale.methods import Method
from shards.ground.errors import InputError

_ROWS = 1024
"""Images whose scores are held at a time."""


def require_exemplars(method: Method) -> None:
    """Refuse a network that assigns images to nothing yet.

    Raises:
        InputError: its clusters are found later in the run.
    """
    if not method.has_exemplars():
        assert method.exemplars is not None
        raise InputError(f"this checkpoint has no {method.exemplars.name}s yet: train on, or take a later one")


def _head_names(name: str, num_heads: int) -> list[str]:
    """Columns of the numbers that each head assigns; what belongs to them is named after them."""
    return [name] if num_heads == 1 else [f"{name}_{number}" for number in range(1, num_heads + 1)]


def first_head(method: Method, features: Tensor, device: torch.device) -> dict[str, pa.Array]:
    """`NAME` and `NAME_score` of features [N, num_features], for the first head."""
    assert method.exemplars is not None
    numbers, scores, _ = _best(method, features, device)
    return _columns(method.exemplars.name, numbers[0], scores[0])


def every_head(method: Method, features: Tensor, device: torch.device) -> tuple[dict[str, pa.Array], dict[str, int]]:
    """`NAME`, `NAME_score`, the runner-up `NAME_second` and by how much it is behind, `NAME_margin`, for each head; and
    how many there are in each head, by `NAME`.

    Args:
        method: that assigns.
        features: float32 [N, num_features].
        device: of the method.
    """
    assert method.exemplars is not None
    numbers, scores, counts = _best(method, features, device)
    columns: dict[str, pa.Array] = {}
    names = _head_names(method.exemplars.name, len(counts))
    for head, name in enumerate(names):
        columns |= _columns(name, numbers[head], scores[head])
        columns[f"{name}_second"] = pa.array(numbers[head][:, 1].numpy(), pa.int32())
        columns[f"{name}_margin"] = pa.array((scores[head][:, 0] - scores[head][:, 1]).numpy(), pa.float32())
    return columns, dict(zip(names, counts, strict=True))


def _columns(name: str, numbers: Tensor, scores: Tensor) -> dict[str, pa.Array]:
    return {
        name: pa.array(numbers[:, 0].numpy(), pa.int32()),
        f"{name}_score": pa.array(scores[:, 0].numpy(), pa.float32()),
    }


@torch.no_grad()
def _best(method: Method, features: Tensor, device: torch.device) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Numbers and scores of the two best of each head, [N, 2], and the sizes of heads."""
    found: list[list[tuple[Tensor, Tensor]]] = []
    counts: list[int] = []
    for some in features.split(_ROWS):  # of no image too, so that columns are there
        heads = method.exemplar_scores(some.to(device))
        counts = [scores.shape[1] for scores in heads]
        found.append([_two_best(scores.float()) for scores in heads])
    numbers = [torch.cat([batch[head][0] for batch in found]).cpu() for head in range(len(counts))]
    scores = [torch.cat([batch[head][1] for batch in found]).cpu() for head in range(len(counts))]
    return numbers, scores, counts


def _two_best(scores: Tensor) -> tuple[Tensor, Tensor]:
    first = scores.max(dim=1)
    others = scores.scatter(1, first.indices[:, None], -torch.inf).max(dim=1)
    return torch.stack((first.indices, others.indices), 1), torch.stack((first.values, others.values), 1)
