"""Forward passes that leave BatchNorm's running statistics as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def statistics_untouched(modules: Iterable[nn.Module]) -> Iterator[None]:
    """A batch that is computed twice must feed running statistics once; batch statistics are used as ever.

    Momentum 0 leaves running statistics as they are; without them torch would save other tensors for the backward pass.
    """
    norms = [(norm, norm.momentum) for norm in modules if isinstance(norm, _BatchNorm) and norm.training]
    counts = [
        (norm.num_batches_tracked, norm.num_batches_tracked.clone())
        for norm, _ in norms
        if norm.num_batches_tracked is not None
    ]
    for norm, _ in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in norms:
            norm.momentum = momentum
        for count, before in counts:
            count.copy_(before)
