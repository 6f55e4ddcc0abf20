"""Features of classes that overlap."""

from __future__ import annotations

import torch

from largescale.evaluate.feature_set import FeatureSet

CLASSES = ("a", "b", "c", "d")


def features(num: int, seed: int, spread: float = 1.0) -> FeatureSet:
    """Features [num, 6] of four overlapping clusters, whose centres are the same for every seed.

    Args:
        num: of rows.
        seed: of labels and noise.
        spread: standard deviation within a cluster.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (num,), generator=generator)
    centres = torch.randn(4, 6, generator=torch.Generator().manual_seed(99))
    rows = centres[labels] + spread * torch.randn(num, 6, generator=generator)
    return FeatureSet(rows, labels, torch.arange(num), CLASSES)
