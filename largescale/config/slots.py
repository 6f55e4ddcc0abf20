"""The schema of a run, put together: the keys that every run has, and those that each owner declares beside itself.

`method.name` fills the group `method` with that method's settings. The groups `optim`, `parallel` and `evaluate` have
the settings of all their optimizers, strategies and protocols at once: a run may go on under another strategy and be
measured by any protocol, and what the chosen one does not use is named as without effect.
"""

from __future__ import annotations

from dataclasses import Field, field, fields, make_dataclass, replace
from functools import cache
from typing import Any

from largescale.config.schema import Config, EvaluateConfig, MethodConfig, OptimConfig, ParallelConfig
from largescale.config.setting import a_name, declared, table_at
from largescale.config.value_types import types_of
from shards.ground.errors import InputError

_PREFIX = "ConfigOf_"
_SHARED: dict[str, Any] = {"optim": OptimConfig, "parallel": ParallelConfig, "evaluate": EvaluateConfig}
"""Groups that have the settings of all their owners."""


@cache
def schema_for(method: str) -> type[Config]:
    """The schema for runs of a method.

    Raises:
        InputError: there is no such method.
    """
    settings = _methods().get(method)
    if settings is None:
        raise InputError(f"method.name={method}: expected {a_name(method, _methods())}")
    groups = {"method": settings, **{name: _with_all_settings(name) for name in _SHARED}}
    return _made(
        f"{_PREFIX}{method}", (Config,), [(name, group, field(default_factory=group)) for name, group in groups.items()]
    )


@cache
def _with_all_settings(group: str) -> Any:
    """The class of a group with the keys of all its owners."""
    base = _SHARED[group]
    by_owner = {name: entry.Settings for name, entry in table_at(base.owners).items()}
    parts = [
        part
        for part in dict.fromkeys(by_owner.values())
        if not any(part is not other and issubclass(other, part) for other in by_owner.values())
    ]
    own: list[tuple[str, Any, Field[Any]]] = []
    for part in parts:
        hints, taken = types_of(part), {name for name, _, _ in own} | {item.name for item in fields(base)}
        for item in fields(part):
            if item.name not in taken:
                owners = tuple(name for name, one in by_owner.items() if item.name in types_of(one))
                own.append((item.name, hints[item.name], _owned(item, owners, base.chosen_by)))
    return _made(f"{_PREFIX}{group}", tuple(parts) or (base,), own)


def _owned(item: Field[Any], owners: tuple[str, ...], chosen_by: str) -> Field[Any]:
    """The field of a key that some owners have."""
    used_if = f"{chosen_by}={'|'.join(owners)}" if chosen_by else ""
    metadata = {"setting": replace(declared(item), owners=owners, used_if=used_if)}
    made: Field[Any] = (
        field(default=item.default, metadata=metadata)
        if not callable(item.default_factory)
        else field(default_factory=item.default_factory, metadata=metadata)
    )
    return made


def _made(name: str, bases: tuple[type, ...], items: list[tuple[str, Any, Field[Any]]]) -> type[Any]:
    made = make_dataclass(name, items, bases=bases, namespace={"__doc__": bases[0].__doc__})
    made.__module__ = __name__
    return made


def __getattr__(name: str) -> Any:
    """Classes that are made here, for pickle, which looks for them by name."""
    of = name.removeprefix(_PREFIX)
    if of != name and of in _SHARED:
        return _with_all_settings(of)
    if of != name and of in _methods():
        return schema_for(of)
    raise AttributeError(name)


def methods_with(key: str) -> list[str]:
    """Methods that have a setting."""
    return [name for name, settings in _methods().items() if key in types_of(settings)]


def method_names() -> list[str]:
    """Names of all methods."""
    return list(_methods())


def method_in(schema: type[Config]) -> str:
    """The method that a schema is for."""
    return schema.__name__.removeprefix(_PREFIX)


def _methods() -> dict[str, type[MethodConfig]]:
    return {name: method.Settings for name, method in table_at(MethodConfig.owners).items()}
