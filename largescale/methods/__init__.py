"""Self-supervised methods, one file each. A new one is a file and a line in METHODS."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from largescale.config import Config
from largescale.methods.milestone import Milestone
from largescale.methods.swav import SwAV
from shards.errors import InputError

METHODS: dict[str, type[SwAV]] = {"swav": SwAV}


def build_method(config: Config, *, on_meta: bool = False) -> SwAV:
    """The method that `method.name` names, with random weights from the current generator; without any `on_meta`.

    Raises:
        InputError: for an unknown name.
    """
    method = _named(config)
    with torch.device("meta") if on_meta else nullcontext():
        return method(config)


def milestones(config: Config) -> list[Milestone]:
    """What the method that `method.name` names begins to do in the course of a run.

    Raises:
        InputError: for an unknown name.
    """
    return _named(config).milestones(config)


def _named(config: Config) -> type[SwAV]:
    if config.method.name not in METHODS:
        raise InputError(f"method.name={config.method.name}: expected one of {', '.join(METHODS)}")
    return METHODS[config.method.name]
