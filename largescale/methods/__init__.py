"""Self-supervised methods, one file each. A new one is a file and a line in METHODS."""

from __future__ import annotations

from collections.abc import Callable

from largescale.config import Config
from largescale.methods.swav import SwAV
from shards.errors import InputError

METHODS: dict[str, Callable[[Config], SwAV]] = {"swav": SwAV}


def build_method(config: Config) -> SwAV:
    """The method that `method.name` names, with random weights from the current generator.

    Raises:
        InputError: for an unknown name.
    """
    if config.method.name not in METHODS:
        raise InputError(f"method.name={config.method.name}: expected one of {', '.join(METHODS)}")
    return METHODS[config.method.name](config)
