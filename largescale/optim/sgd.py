"""What can be set of torch's SGD with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from largescale.config import OptimConfig
from largescale.config.setting import setting


@dataclass
class Settings(OptimConfig):
    """Keys under `optim`."""

    momentum: float = setting(
        0.9, "Fraction of the previous update that is kept.", at_least=0, below=1, expected="at least 0 and below 1"
    )


def options(settings: Settings) -> dict[str, Any]:
    """What the optimizer is built with. Not fused: torch cannot run that on the sharded parameters of FSDP2."""
    return {"momentum": settings.momentum, "foreach": True}
