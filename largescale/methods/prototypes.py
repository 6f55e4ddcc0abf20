"""Prototypes of clustering methods (SwAV, arXiv 2006.09882, section 3.3)."""

from __future__ import annotations

from torch import Tensor, nn

from largescale.models.unit_rows import normalize_rows_


class Prototypes(nn.Module):
    """One or several heads of unit-length prototypes; scores are cosines of embeddings and prototypes."""

    def __init__(self, embedding: int, counts: list[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(embedding, count, bias=False) for count in counts)
        self.finish_initialisation()

    def forward(self, embeddings: Tensor) -> list[Tensor]:
        """Unit embeddings [N, D] to one [N, K] tensor of scores per head."""
        return [head(embeddings) for head in self.heads]

    def finish_initialisation(self) -> None:
        """Bring new weights to length 1; `models.initialise` calls it as well."""
        normalize_rows_(self.parameters())
