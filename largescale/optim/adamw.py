"""What can be set of torch's AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from largescale.config import OptimConfig
from largescale.config.setting import setting


@dataclass
class Settings(OptimConfig):
    """Keys under `optim`."""

    betas: list[float] = setting(
        [0.9, 0.999],
        "Decay rates of the running averages of the gradient and its square.",
        at_least=0,
        below=1,
        length=2,
        expected="two numbers, each at least 0 and below 1",
    )


def options(settings: Settings) -> dict[str, Any]:
    """What the optimizer is built with."""
    return {"betas": (settings.betas[0], settings.betas[1]), "fused": True}
