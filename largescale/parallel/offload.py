"""Sharded state in host memory: a setting that several strategies have."""

from __future__ import annotations

from dataclasses import dataclass

from largescale.config import Config, ParallelConfig
from largescale.config.setting import setting


@dataclass
class Settings(ParallelConfig):
    """Keys under `parallel`."""

    cpu_offload: bool = setting(
        False, "Keep sharded parameters and optimizer state in host memory, and update them there.", free=True
    )


def offloads(config: Config) -> bool:
    """Whether the strategy of a configuration is to do so."""
    assert isinstance(config.parallel, Settings)
    return config.parallel.cpu_offload
