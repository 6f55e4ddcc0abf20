"""How samples are assigned in a step: what of Sinkhorn-Knopp follows a schedule, and how large clusters should be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from largescale.methods.swav.settings import Settings


@dataclass(frozen=True)
class Assignment:
    """What holds in one step.

    Attributes:
        epsilon: entropy regularisation.
        iterations: of Sinkhorn-Knopp.
        temperature: of predictions.
        hard: whether a sample's code is its nearest prototype alone (VISSL's `temp_hard_assignment_iters`).
    """

    epsilon: float
    iterations: int
    temperature: float
    hard: bool

    @classmethod
    def at(cls, step: int, num_steps: int, settings: Settings) -> Assignment:
        """By half a cosine from the values of the first step to those of the last; iterations linearly."""
        done = min(1.0, step / max(1, num_steps - 1))
        risen = (1 - math.cos(math.pi * done)) / 2

        def between(start: float, end: float) -> float:
            return start + (end - start) * risen if end else start

        first, last = settings.sinkhorn_iterations, settings.sinkhorn_iterations_end
        return cls(
            epsilon=between(settings.epsilon, settings.epsilon_end),
            iterations=round(first + (last - first) * done) if last else first,
            temperature=between(settings.temperature, settings.temperature_end),
            hard=step < settings.hard_codes_steps,
        )


def prior(count: int, power: float, device: torch.device | None = None) -> Tensor | None:
    """Shares of the samples that prototypes should get, float64 [K]: the k-th (k + 1)^-power of the first's; None for
    equal ones, `power` 0.

    Source: PMSN, arXiv 2210.07277, section 4, where a power law replaces the uniform prior for long-tailed data.
    """
    if power == 0:
        return None
    # Made where it is used: a copy to the device would make the host wait for it.
    shares = torch.arange(1, count + 1, dtype=torch.float64, device=device) ** -power
    return shares / shares.sum()


def hardened(codes: Tensor) -> Tensor:
    """Codes [..., K] whose largest share has become 1."""
    return torch.zeros_like(codes).scatter_(-1, codes.argmax(-1, keepdim=True), 1)
