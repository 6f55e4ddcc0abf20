"""Numbers of all ranks on every rank, where ranks have different numbers of them."""

from __future__ import annotations

import torch
from torch import Tensor

from largescale.distributed.collectives import all_gather
from largescale.processes import rank, world_size


def all_rows(rows: Tensor) -> Tensor:
    """Rows [n, ...] of all ranks in the order of ranks. Collectives: every rank must call it; two all-gathers."""
    if world_size() == 1:
        return rows
    numbers = _numbers(len(rows), rows.device)
    most = max(numbers)
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    whole = rows.new_empty(world_size() * most, *rows.shape[1:])
    all_gather(whole, padded)
    return torch.cat([part[:number] for part, number in zip(whole.split(most), numbers, strict=True)])


def own_part(places: Tensor, number: int) -> Tensor:
    """Of sorted places among all ranks' rows those on this rank, counted from its first; it has `number` rows.

    Collectives: every rank must call it; one all-gather of a number.
    """
    if world_size() == 1:
        return places
    first = sum(_numbers(number, places.device)[: rank()])
    return places[(places >= first) & (places < first + number)] - first


def _numbers(own: int, device: torch.device) -> list[int]:
    found = torch.empty(world_size(), dtype=torch.int64, device=device)
    all_gather(found, torch.tensor([own], device=device))
    return [int(number) for number in found.tolist()]
