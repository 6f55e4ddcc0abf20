"""From YAML files that `extends:` each other and `key=value` overrides to a checked configuration.

A configuration is built in this order, later wins: schema defaults, the files named by `extends:` (outermost
first), the file itself, the overrides of the command line, of which the last one of a key wins. `train.epochs` and
`train.steps` are one choice: where a later layer sets `train.epochs` alone, `train.steps` of those before no longer
counts. An unknown key, a wrong type or a value out of range is an `InputError` that names the key and what to write
instead.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from largescale.config.checks import validate
from largescale.config.names import did_you_mean
from largescale.config.schema import Config, CropGroup
from largescale.config.value_types import element_group, form, misfit_of_type
from largescale.config.yaml_file import NotReadable, parse
from shards.errors import InputError

_REFUSALS = (OmegaConfBaseException, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError)
"""What OmegaConf raises of values that it cannot take."""


def load_config(path: str | Path, overrides: list[str] | None = None, *, default_shards: str = "") -> Config:
    """Read a YAML recipe, follow its `extends:`, apply `key=value` overrides and validate the whole.

    Args:
        path: the recipe.
        overrides: of its values; `data.crops.0.size=24` replaces one of an element of a list.
        default_shards: `data.shards` where neither sets it, for commands that do not read them.

    Raises:
        InputError: naming the file or key, what it got and what it expects.
    """
    merged = copy.deepcopy(_defaults())
    for origin, content in _layers(Path(path)):
        _let_epochs_count(merged, _apply(merged, content, f"{origin}: "))
    given = {key for item in overrides or [] for key in _override(merged, item)}
    if {"train.epochs", "train.steps"} <= given and merged.train.steps != 0:
        raise InputError(f"train.epochs={merged.train.epochs:g} train.steps={merged.train.steps}: expected one of "
                         f"them, the run is as long as one says; leave out the other")
    _let_epochs_count(merged, given)
    if default_shards and OmegaConf.is_missing(merged.data, "shards"):
        merged.data.shards = default_shards
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise InputError(f"{path}: {missing[0]} is not set; add it to the file or pass {missing[0]}=VALUE")
        OmegaConf.resolve(merged)
        config = OmegaConf.to_object(merged)
        _expand_home(config)
    except InputError:
        raise
    except _REFUSALS as error:
        key = getattr(error, "full_key", None)
        if not key and (misfit := _misfit_of_resolved(merged)):
            raise InputError(misfit) from error
        raise InputError(f"{path}: {key or '?'}: {str(error).splitlines()[0]}") from error
    validate(config)
    return config


def _misfit_of_resolved(merged: DictConfig) -> str:
    """Of a `${...}` that stands for a value of another type: OmegaConf does not name its key where that is a list."""
    values = OmegaConf.to_container(merged)
    leaves = list(_leaves(values, Config, "", ""))
    for place, element in enumerate(values["data"]["crops"]):
        leaves += _leaves(element, CropGroup, "", f"data.crops[{place}].")
    for key, value, hint in leaves:
        try:
            OmegaConf.select(merged, key)
        except _REFUSALS:
            return f"{key}={value}: expected {form(hint)}"
    return ""


def _expand_home(config: Config) -> None:
    """`~` in paths is the user's home folder: no shell replaces it in files, nor behind `key=`."""
    for owner, name in ((config.run, "dir"), (config.data, "shards"), (config.data, "subset"), (config.data, "cache"),
                        (config.data, "eval_shards"), (config.evaluate, "train_shards"), (config, "init_from"),
                        (config.checkpoint, "mirror")):
        setattr(owner, name, _at_home(getattr(owner, name)))


def _at_home(value: Any) -> Any:
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    if isinstance(value, dict):
        return {key: _at_home(item) if key in ("path", "subset") else item for key, item in value.items()}
    return os.path.expanduser(value) if isinstance(value, str) else value


@cache
def _defaults() -> DictConfig:
    """The schema; making it takes longer than all the rest of loading, copying it does not."""
    return OmegaConf.structured(Config)


def _layers(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """The file and everything it extends, outermost base first."""
    if not path.is_file():
        raise InputError(f"{path}: no such configuration file; see the folder configs/ for recipes")
    if path.resolve() in seen:
        raise InputError(f"{path}: extends itself; remove the circle of `extends:`")
    try:
        content = parse(path.read_text(encoding="utf-8")) or {}
    except (NotReadable, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping of keys at the top of the file")
    base = content.pop("extends", None)
    if not isinstance(base, str | None):
        raise InputError(f"{path}: extends={base}: expected one file, relative to this one")
    inherited = _layers(path.parent / base, (*seen, path.resolve())) if base else []
    return [*inherited, (str(path), content)]


def _let_epochs_count(merged: DictConfig, given: set[str]) -> None:
    """Where a layer says how long in epochs, no number of steps from earlier layers may overrule it."""
    if "train.epochs" in given and "train.steps" not in given:
        merged.train.steps = 0


def _override(merged: DictConfig, item: str) -> set[str]:
    """Apply one; returns the keys that it sets."""
    key, equals, text = item.partition("=")
    key = re.sub(r"\[(\d+)\]", r".\1", key.strip())
    if not equals or not key:
        raise InputError(f"override {item!r}: expected key=value, for example optim.lr=0.6")
    try:
        value = parse(text)
    except NotReadable as error:
        raise InputError(f"override {item!r}: not readable as YAML ({error})") from error
    hint = _hint(merged, key)
    if is_dataclass(hint):
        if not isinstance(value, dict):
            raise InputError(f"{key} is a group of keys, not a value; set {key}.KEY")
        return _apply(merged, value, "", schema=hint, prefix=f"{key}.")
    if text.strip() == "" or (hint is str and isinstance(value, int | float)):
        value = text  # a run may be named 007 or 1e3
    _set(merged, key, value, hint, "")
    return {key}


def _hint(merged: DictConfig, key: str) -> Any:
    """The type of a key, which may lead through elements of lists.

    Raises:
        InputError: there is no such key or element.
    """
    hint: Any = Config
    parts = key.split(".")
    for place, part in enumerate(parts):
        parent = ".".join(parts[:place])
        if is_dataclass(hint):
            hints = get_type_hints(hint)
            if part not in hints:
                raise InputError(f"unknown key {key}{did_you_mean(key)}")
            hint = hints[part]
            continue
        present = OmegaConf.select(merged, parent)
        if not OmegaConf.is_list(present) or not part.isdecimal():
            raise InputError(f"unknown key {key}: {parent} is not a group of keys")
        if int(part) >= len(present):
            raise InputError(f"unknown key {key}: {parent} has {len(present)} elements, from 0; set the whole list, "
                             f"{parent}=[...]")
        hint = hint.__args__[0] if hasattr(hint, "__args__") else Any
    return hint


def _apply(
    merged: DictConfig, content: dict[str, Any], origin: str, *, schema: type = Config, prefix: str = ""
) -> set[str]:
    """Set all keys of a layer; returns them."""
    leaves = list(_leaves(content, schema, origin, prefix))
    for key, value, hint in leaves:
        _set(merged, key, value, hint, origin)
    return {key for key, _, _ in leaves}


def _leaves(content: dict[str, Any], schema: type, origin: str, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """Walk a layer beside the schema: key, value and type; stop at the first key that the schema does not have."""
    hints = get_type_hints(schema)
    for name, value in content.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise InputError(f"{origin}unknown key {key}{did_you_mean(key)}")
        if not is_dataclass(hints[name]):
            yield key, value, hints[name]
        elif isinstance(value, dict):
            yield from _leaves(value, hints[name], origin, f"{key}.")
        else:
            raise InputError(f"{origin}{key} is a group of keys, not a value; set {key}.KEY")


def _set(merged: DictConfig, key: str, value: Any, hint: Any, origin: str) -> None:
    expected = misfit_of_type(value, hint)
    try:
        if not expected and (group := element_group(hint)):
            value = [_element(element, group, f"{key}[{place}].", origin) for place, element in enumerate(value)]
        if not expected:
            OmegaConf.update(merged, key, value, merge=False)
    except InputError:
        raise
    except _REFUSALS as error:
        expected = form(hint)
        if isinstance(value, str) and "${" in value:
            expected = f"no ${{...}} that cannot be resolved ({str(error).splitlines()[0]})"
    if expected:
        raise InputError(f"{origin}{key}={value}: expected {expected}")


def _element(content: dict[str, Any], schema: type, prefix: str, origin: str) -> DictConfig:
    """An element of a list of groups; what it does not set has its default."""
    element = OmegaConf.structured(schema)
    for key, value, hint in _leaves(content, schema, origin, prefix):
        _set(element, key.removeprefix(prefix), value, hint, f"{origin}{prefix}")
    return element
