"""The schema of a run: what `method.name` names fills the group `method` with its own settings."""

from __future__ import annotations

from dataclasses import field, make_dataclass
from functools import cache
from typing import Any

from largescale.config.schema import Config, MethodConfig
from largescale.config.setting import a_name, table_at
from shards.ground.errors import InputError

_PREFIX = "ConfigOf_"


@cache
def schema_for(method: str) -> type[Config]:
    """The schema of runs of a method.

    Raises:
        InputError: there is no such method.
    """
    settings = _methods().get(method)
    if settings is None:
        raise InputError(f"method.name={method}: expected {a_name(method, _methods())}")
    schema = make_dataclass(f"{_PREFIX}{method}", [("method", settings, field(default_factory=settings))],
                            bases=(Config,))
    schema.__module__ = __name__
    return schema


def __getattr__(name: str) -> Any:
    """Classes that `schema_for` makes, for pickle, which looks for them here."""
    if name.startswith(_PREFIX) and (method := name.removeprefix(_PREFIX)) in _methods():
        return schema_for(method)
    raise AttributeError(name)


def methods_with(key: str) -> list[str]:
    """Methods that have a setting."""
    return [name for name, settings in _methods().items() if key in settings.__dataclass_fields__]


def method_names() -> list[str]:
    """All methods."""
    return list(_methods())


def method_in(schema: type[Config]) -> str:
    """The method whose runs a schema is of."""
    return schema.__name__.removeprefix(_PREFIX)


def _methods() -> dict[str, type[MethodConfig]]:
    return {name: method.Settings for name, method in table_at("largescale.methods:METHODS").items()}
