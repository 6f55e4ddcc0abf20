"""What stands on the backbone: the projection head and the prototypes (SwAV, arXiv 2006.09882, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def projection_head(num_features: int, hidden: list[int], embedding: int, *, batchnorm: bool) -> nn.Sequential:
    """Linear layers with BatchNorm and ReLU between: [B, num_features] to [B, embedding]."""
    layers: list[nn.Module] = []
    width = num_features
    for next_width in hidden:
        layers.append(nn.Linear(width, next_width, bias=not batchnorm))
        if batchnorm:
            layers.append(nn.BatchNorm1d(next_width))
        layers.append(nn.ReLU(inplace=True))
        width = next_width
    layers.append(nn.Linear(width, embedding))
    return nn.Sequential(*layers)


class Prototypes(nn.Module):
    """One or several heads of unit-length prototypes; scores are cosines of embeddings and prototypes."""

    def __init__(self, embedding: int, counts: list[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(embedding, count, bias=False) for count in counts)
        self.normalize_()

    def forward(self, embeddings: Tensor) -> list[Tensor]:
        """Unit embeddings [N, D] to one [N, K] tensor of scores a head."""
        return [head(embeddings) for head in self.heads]

    @torch.no_grad()
    def normalize_(self) -> None:
        """Scale every prototype to length 1, in place.

        Collectives: none; under FSDP2 the rows of a prototype matrix are whole on their rank.
        """
        for head in self.heads:
            weight = head.weight
            rows = weight.to_local() if isinstance(weight, DTensor) else weight
            rows.copy_(nn.functional.normalize(rows, dim=1))
