"""Forward passes in which BatchNorm uses its running statistics, within a network that is being trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def running_statistics_used(modules: Iterable[nn.Module]) -> Iterator[None]:
    """So that an image's output does not depend on the others of its batch; running statistics stay as they are."""
    norms = [norm for norm in modules if isinstance(norm, _BatchNorm) and norm.training]
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True
