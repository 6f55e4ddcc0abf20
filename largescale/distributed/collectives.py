"""Exchanges between ranks that several parts of the package make, and their names for a plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

_named: list[str] = []
"""What is exchanged within `exchanging`, innermost last."""


@contextmanager
def exchanging(what: str) -> Iterator[None]:
    """Name what the collectives within exchange, so that a plan can list them (`largescale.plan.trace`)."""
    _named.append(what)
    try:
        yield
    finally:
        _named.pop()


def exchanged(otherwise: str) -> str:
    """What is being exchanged; `otherwise` outside of `exchanging`."""
    return _named[-1] if _named else otherwise


def sum_over_ranks(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over all ranks of several tensors, in one message.

    Args:
        parts: by name, the same names and shapes on every rank; any type of numbers.

    Returns:
        Their sums, float64 on the host. The host waits for the device once.

    Collectives: every rank must call it; one all-reduce of float64 numbers, as many as the parts have elements.
    """
    message = torch.cat([part.flatten().double() for part in parts.values()])
    dist.all_reduce(message)
    sums = message.cpu().split([part.numel() for part in parts.values()])
    return {name: total.view(part.shape) for (name, part), total in zip(parts.items(), sums, strict=True)}
