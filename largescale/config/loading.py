"""From YAML files that `extends:` each other and `key=value` overrides to a checked configuration.

A configuration is built in this order, later ones win: schema defaults, the files named by `extends:` (outermost
first), the file itself, the overrides on the command line (the last one of a key wins). Which settings there are
under `method` is decided first, by the last of these that sets `method.name`. `train.epochs` and
`train.steps` are one choice: if a later layer sets `train.epochs` alone, `train.steps` of earlier layers no longer
counts. An unknown key, a wrong type or an out-of-range value is an `InputError` that names the key and what to write
instead.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from largescale.config.checks import validate
from largescale.config.merging import REFUSALS, Merged, Override
from largescale.config.names import all_keys, declarations
from largescale.config.recipes import find_recipe, packaged_recipe
from largescale.config.schema import Config, MethodConfig
from largescale.config.setting import declared
from largescale.config.slots import schema_for
from largescale.config.value_types import types_of
from largescale.config.yaml_file import NotReadable, parse
from shards.ground.errors import InputError


def load_config(path: str | Path, overrides: list[str] | None = None, *, default_shards: str = "") -> Config:
    """Read a YAML recipe, follow its `extends:`, apply `key=value` overrides and validate the whole.

    Args:
        path: the recipe: a file, or the name of one that comes with the package, such as `swav/resnet50_800ep`.
        overrides: of its values; `data.crops.0.size=24` replaces one of an element of a list.
        default_shards: `data.shards` if neither sets it, for commands that do not read shards.

    Raises:
        InputError: naming the file or key, what it got and what it expects.
    """
    layers, given = _layers(find_recipe(path)), [Override(item) for item in overrides or []]
    merged = Merged(schema_for(_method_name([*(content for _, content in layers), *(one.nested() for one in given)])))
    values = merged.values
    for origin, content in layers:
        _let_epochs_count(values, merged.apply(content, f"{origin}: "))
    keys = {key for one in given for key in merged.override(one)}
    if {"train.epochs", "train.steps"} <= keys and values.train.steps != 0:
        raise InputError(
            f"train.epochs={values.train.epochs:g} train.steps={values.train.steps}: expected only "
            f"one, since both set the length of the run; leave the other out"
        )
    _let_epochs_count(values, keys)
    if default_shards and OmegaConf.is_missing(values.data, "shards"):
        values.data.shards = default_shards
    return _checked(merged, str(path))


def config_of_values(flat: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration that a checkpoint holds: values by dotted key, those that this version knows. A key that came
    since has its `before`, if it has one, or its default.

    Args:
        flat: the values.
        origin: where they are from, for messages.
        overrides: `key=value` replacements of them.

    Raises:
        InputError: naming `origin` and the key, or the override.
    """
    schema = schema_for(str(flat.get("method.name", MethodConfig.name)))
    known = {*all_keys(schema), *types_of(schema)["method"].moved}
    came_since = {key: before for key, item, _ in declarations(schema) if (before := declared(item).before) is not None}
    nested: dict[str, Any] = {}
    for key, value in {**came_since, **flat}.items():
        if key in known:
            *groups, name = key.split(".")
            reduce(lambda level, group: level.setdefault(group, {}), groups, nested)[name] = value
    merged = Merged(schema)
    merged.apply(nested, f"{origin}: ")
    for override in overrides:
        merged.override(Override(override))
    return _checked(merged, origin)


def _checked(merged: Merged, path: str) -> Config:
    """The configuration of all layers, with paths of this user, fit to be run."""
    values = merged.values
    try:
        OmegaConf.resolve(values)
        config = cast(Config, OmegaConf.to_object(values))
        _expand_home(config)
    except InputError:
        raise
    except REFUSALS as error:
        if missing := _missing_key(values):
            raise InputError(f"{path}: {missing} is not set; add it to the file or pass {missing}=VALUE") from error
        key = getattr(error, "full_key", None)
        if not key and (misfit := merged.misfit_of_resolved()):
            raise InputError(misfit) from error
        raise InputError(f"{path}: {key or '?'}: {str(error).splitlines()[0]}") from error
    validate(config)
    return config


def _missing_key(values: DictConfig) -> str:
    """The first key without a value; empty if there is none, or if a `${...}` cannot be resolved."""
    try:
        return min(OmegaConf.missing_keys(values), default="")
    except REFUSALS:
        return ""


def _expand_home(config: Config) -> None:
    """Replace `~` in paths by the home folder: the shell does so neither in files nor after `key=`."""
    for owner, name in (
        (config.run, "dir"),
        (config.data, "shards"),
        (config.data, "subset"),
        (config.data, "cache"),
        (config.data, "eval_shards"),
        (config.evaluate, "train_shards"),
        (config, "init_from"),
        (config.model, "weights"),
        (config.checkpoint, "mirror"),
    ):
        setattr(owner, name, _at_home(getattr(owner, name)))
    if (support := config.method.supports()) is not None:
        support.shards, support.subset = _at_home(support.shards), _at_home(support.subset)


def _at_home(value: Any) -> Any:
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    if isinstance(value, dict):
        return {key: _at_home(item) if key in ("path", "subset") else item for key, item in value.items()}
    return os.path.expanduser(value) if isinstance(value, str) else value


def _method_name(layers: list[dict[str, Any]]) -> str:
    """The last `method.name` in the layers, or the default."""
    groups = [layer["method"] for layer in layers if isinstance(layer.get("method"), dict)]
    names = [group["name"] for group in groups if "name" in group]
    return str(names[-1]) if names else MethodConfig.name


def _layers(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """The file and everything it extends, outermost base first."""
    if path.resolve() in seen:
        raise InputError(f"{path}: extends itself; break the cycle of `extends:`")
    try:
        content = parse(path.read_text(encoding="utf-8"), keep_text=True) or {}
    except (NotReadable, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping of keys at the top of the file")
    base = content.pop("extends", None)
    if not isinstance(base, str | None):
        raise InputError(f"{path}: extends={base}: expected one file, relative to this one, or a recipe")
    inherited = _layers(_extended(path, base), (*seen, path.resolve())) if base else []
    return [*inherited, (str(path), content)]


def _extended(path: Path, base: str) -> Path:
    """The file that one extends: relative to it, or a packaged recipe."""
    beside = path.parent / base
    found = beside if beside.is_file() else packaged_recipe(base)
    if found is None:
        raise InputError(f"{path}: extends={base}: no such configuration file beside it, and no such recipe")
    return found


def _let_epochs_count(values: DictConfig, given: set[str]) -> None:
    """If a layer sets the length in epochs, a number of steps from earlier layers must not override it."""
    if "train.epochs" in given and "train.steps" not in given:
        values.train.steps = 0
