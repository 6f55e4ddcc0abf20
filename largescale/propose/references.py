"""The packaged recipe that a proposed one starts from: tuned for networks and batches of about the same size."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from largescale.config import Config, load_config
from largescale.config.recipes import packaged
from largescale.config.setting import a_name
from largescale.methods import METHODS
from shards.ground.errors import InputError


def reference(method: str, *, small: bool) -> tuple[str, Config]:
    """Name and values of the recipe that a method names for `largescale init`.

    Args:
        method: a `method.name`.
        small: whether it is for a network that trains without a GPU.

    Raises:
        InputError: there is no such method, or no recipe of it.
    """
    if method not in METHODS:
        raise InputError(f"--method {method}: expected {a_name(method, METHODS)}")
    found = METHODS[method]
    name = (found.small_reference or f"small/{method}") if small else found.reference
    if name not in packaged():
        raise InputError(f"--method {method}: no recipe of it comes with the package; choose another method")
    return name, load_config(name, default_shards="unset")


def changed_values(settings: Any) -> dict[str, Any]:
    """The values of a group of settings that are not the defaults, by key; with dots in groups within it."""
    found: dict[str, Any] = {}
    for item in fields(settings):
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        value = getattr(settings, item.name)
        if is_dataclass(value):
            found |= {f"{item.name}.{key}": one for key, one in changed_values(value).items()}
        elif value != default:
            found[item.name] = value
    return found
