"""Self-supervised methods, one file each. A new one is a file and a line in METHODS."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch

from largescale.config import Config
from largescale.methods.swav import SwAV
from shards.errors import InputError

METHODS: dict[str, Callable[[Config], SwAV]] = {"swav": SwAV}


def build_method(config: Config, *, on_meta: bool = False) -> SwAV:
    """The method that `method.name` names, with random weights from the current generator; without any `on_meta`.

    Raises:
        InputError: for an unknown name.
    """
    if config.method.name not in METHODS:
        raise InputError(f"method.name={config.method.name}: expected one of {', '.join(METHODS)}")
    with torch.device("meta") if on_meta else nullcontext():
        return METHODS[config.method.name](config)
