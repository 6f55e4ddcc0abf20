"""Views of a configuration: its values by key, its YAML, and settings that take more than one form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from largescale.config.data_settings import CropGroup, DataConfig
from largescale.config.model_settings import LATER
from largescale.config.schema import Config
from shards.ground.errors import InputError

_LARGEST_WEIGHT = 1e9


def to_yaml(config: Config) -> str:
    """The fully resolved configuration as YAML; loading it again gives an equal configuration."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def flatten(config: Config) -> dict[str, Any]:
    """All values by dotted key, lists whole."""
    flat: dict[str, Any] = {}

    def visit(node: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                visit(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value

    visit(asdict(config), "")
    return flat


def without_later_defaults(flat: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted key as records of earlier versions have them, which do not know the keys of `LATER`."""
    return {key: value for key, value in flat.items() if key not in LATER or LATER[key] != value}


def with_present_names(flat: dict[str, Any], config: Config) -> dict[str, Any]:
    """Values by dotted key that an earlier version wrote, by the keys of this one; crop groups with all their keys."""
    present = {config.method.moved.get(key, key): value for key, value in flat.items()}
    if isinstance(groups := present.get("data.crops"), list):
        present["data.crops"] = [{**asdict(CropGroup()), **group} for group in groups]
    return present


def corpus_settings(data: DataConfig) -> list[tuple[str, float, str]]:
    """Location, weight and subset file of each corpus that `data.shards` names.

    Raises:
        InputError: neither a location nor a list of {path, weight, subset}, or one of them twice.
    """
    expected = "a folder or URL, or a list of {path: FOLDER, weight: SHARE above 0, subset: FILE}"
    if isinstance(data.shards, str):
        require(data.shards != "", "data.shards", data.shards, expected)
        return [(data.shards, 1.0, data.subset)]
    require(isinstance(data.shards, list) and len(data.shards) > 0, "data.shards", data.shards, expected)
    require(not data.subset, "data.subset", data.subset, "nothing when data.shards is a list; set it in the list")
    settings: list[tuple[str, float, str]] = []
    for item in data.shards:
        row = {"path": item} if isinstance(item, str) else item
        require(isinstance(row, dict) and _is_corpus(row), "data.shards", item, expected)
        settings.append((row["path"], float(row.get("weight", 1.0)), row.get("subset", "")))
    _reject_twice(settings)
    return settings


def _is_corpus(row: dict[Any, Any]) -> bool:
    weight = row.get("weight", 1.0)
    return (
        {"path"} <= set(row) <= {"path", "weight", "subset"}
        and isinstance(row["path"], str)
        and row["path"] != ""
        and isinstance(row.get("subset", ""), str)
        and type(weight) in (int, float)
        and 0 < weight <= _LARGEST_WEIGHT
    )


def _reject_twice(settings: list[tuple[str, float, str]]) -> None:
    """A folder may be listed twice only with different subsets; else an epoch would use its samples twice."""
    by_place: dict[str, list[str]] = {}
    for location, _, subset in settings:
        place = location.rstrip("/") if "://" in location else str(Path(location).resolve())
        by_place.setdefault(place, []).append(subset)
    for place, subsets in by_place.items():
        alone = len(subsets) == 1 or ("" not in subsets and len(set(subsets)) == len(subsets))
        require(
            alone,
            "data.shards",
            place,
            "each folder once, or with a different subset each time; to use it more than others, raise its weight",
        )


def corpus_names(data: DataConfig) -> str:
    """The names of the shard folders trained on."""
    return " + ".join(Path(location).name for location, _, _ in corpus_settings(data))


def require(holds: bool, key: str, got: object, expected: str) -> None:
    """Raise an `InputError` that names the key, what it got and what it expects, unless `holds`."""
    if not holds:
        raise InputError(f"{key}={got}: expected {expected}")


def written(value: Any) -> str:
    """A value as one would write it in a recipe."""
    if is_dataclass(value):
        value = {item.name: getattr(value, item.name) for item in fields(value)}
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {written(one)}' for key, one in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value) or "''"


def enumerated(names: Sequence[str], word: str) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return f" {word} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
