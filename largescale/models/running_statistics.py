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
    before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in modules
              if isinstance(norm, _BatchNorm) and norm.training]
    for norm, _, _ in before:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
