"""From YAML files that `extends:` each other and `key=value` overrides to a checked configuration.

A configuration is built in this order, later wins: schema defaults, the files named by `extends:` (outermost
first), the file itself, the overrides of the command line. `train.epochs` and `train.steps` are one choice: where a
later layer sets `train.epochs` alone, `train.steps` of those before no longer counts. An unknown key, a wrong type or a
value out of range is an `InputError` that names the key and what to write instead.
"""

from __future__ import annotations

import difflib
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from largescale.config.checks import validate
from largescale.config.schema import Config
from shards.errors import InputError


def load_config(path: str | Path, overrides: list[str] | None = None, *, default_shards: str = "") -> Config:
    """Read a YAML recipe, follow its `extends:`, apply `key=value` overrides and validate the whole.

    Args:
        path: the recipe.
        overrides: of its values.
        default_shards: `data.shards` where neither sets it, for commands that do not read them.

    Raises:
        InputError: naming the file or key, what it got and what it expects.
    """
    merged: Any = OmegaConf.structured(Config)
    try:
        for origin, layer in [*_layers(Path(path)), *_override_layers(overrides or [])]:
            _reject_unknown(layer, Config, origin)
            _let_epochs_count(layer)
            merged = OmegaConf.merge(merged, layer)
        OmegaConf.resolve(merged)
        if default_shards and OmegaConf.is_missing(merged.data, "shards"):
            merged.data.shards = default_shards
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise InputError(f"{path}: {missing[0]} is not set; add it to the file or pass {missing[0]}=VALUE")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise InputError(f"{path}: {key}: {str(error).splitlines()[0]}") from error
    validate(config)
    return config


def _layers(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[str, DictConfig]]:
    """The file and everything it extends, outermost base first."""
    if not path.is_file():
        raise InputError(f"{path}: no such configuration file; see the folder configs/ for recipes")
    if path.resolve() in seen:
        raise InputError(f"{path}: extends itself; remove the circle of `extends:`")
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping of keys at the top of the file")
    base = content.pop("extends", None)
    inherited = _layers(path.parent / str(base), (*seen, path.resolve())) if base else []
    return [*inherited, (str(path), OmegaConf.create(content))]


def _override_layers(overrides: list[str]) -> list[tuple[str, DictConfig]]:
    layers = [(item, _override_layer(item)) for item in overrides]
    given = OmegaConf.merge(*(layer for _, layer in layers)) if layers else {}
    if {"epochs", "steps"} <= _keys_of_train(given) and given["train"]["steps"] != 0:
        raise InputError(f"train.epochs={given['train']['epochs']} train.steps={given['train']['steps']}: expected one "
                         f"of them, the run is as long as one says; leave out the other")
    return layers


def _let_epochs_count(layer: DictConfig) -> None:
    """Where a layer says how long in epochs, no number of steps from earlier layers may overrule it."""
    given = _keys_of_train(layer)
    if "epochs" in given and "steps" not in given:
        layer["train"]["steps"] = 0


def _keys_of_train(layer: Any) -> set[str]:
    train = layer.get("train")
    return set(train) if isinstance(train, DictConfig) else set()


def _override_layer(item: str) -> DictConfig:
    if "=" not in item:
        raise InputError(f"override {item!r}: expected key=value, for example optim.lr=0.6")
    try:
        return OmegaConf.from_dotlist([item])
    except yaml.YAMLError as error:
        raise InputError(f"override {item!r}: not readable as YAML ({str(error).splitlines()[0]})") from error


def _reject_unknown(layer: DictConfig, schema: type, origin: str, prefix: str = "") -> None:
    """Walk a layer beside the schema and stop at the first key that the schema does not have."""
    hints = get_type_hints(schema)
    for key in layer:
        if key not in hints:
            raise InputError(f"{origin}: unknown key {prefix}{key}{_suggest(prefix + str(key))}")
        if is_dataclass(hints[key]):
            value = OmegaConf.to_container(layer, resolve=False)[key]
            if not isinstance(value, dict):
                raise InputError(f"{origin}: {prefix}{key} is a group of keys, not a value; set {prefix}{key}.KEY")
            _reject_unknown(layer[key], hints[key], origin, f"{prefix}{key}.")


def _suggest(key: str) -> str:
    known = _all_keys(Config)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    tail = key.rsplit(".", 1)[-1]
    same_tail = [name for name in known if name.rsplit(".", 1)[-1] == tail]
    best = same_tail[:1] or close
    return f"; did you mean {best[0]}?" if best else "; `largescale pretrain CONFIG --print` lists all keys"


def _all_keys(schema: type, prefix: str = "") -> list[str]:
    hints = get_type_hints(schema)
    keys: list[str] = []
    for item in fields(schema):
        assert item.default is not MISSING or item.default_factory is not MISSING, item.name
        name = f"{prefix}{item.name}"
        keys += _all_keys(hints[item.name], f"{name}.") if is_dataclass(hints[item.name]) else [name]
    return keys
