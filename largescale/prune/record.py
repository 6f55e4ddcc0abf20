"""`pruning.json`: what is pruned and how, so that the same command goes on and another is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from largescale.checkpoint.folder import Checkpoint
from largescale.config import Config, flatten, free_keys
from largescale.prune.wish import Wish
from largescale.run.table import PRUNING as RECORD
from shards.ground.errors import InputError
from shards.ground.files import atomic_write

VERSION = 1
"""To be raised when the same run and settings give other masks."""

OWN_KEYS = ("name", "run.dir", "model.mask", "checkpoint.mirror")
"""Settings that each round has for itself."""


def record_of(trained: Checkpoint, wish: Wish, masks: Path | None, config: Config) -> dict[str, Any]:
    """What the file holds."""
    free = free_keys(config) | set(OWN_KEYS)
    settings = {key: value for key, value in flatten(config).items() if key not in free}
    how = wish.stamp() | {"masks": str(masks or "")}
    return {"version": VERSION, "of": trained.content_hash, "wish": how, "settings": settings}


def compare(out: Path, record: dict[str, Any]) -> None:
    """Compare with what a former start recorded, if one did.

    Raises:
        InputError: it was another pruning, or the folder holds something else.
    """
    path = out / RECORD
    if path.exists():
        if change := _change(_read(path), record):
            raise InputError(f"{out}: was made with {change}; use another --out, or the settings of before")
    elif out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: holds something else than a pruning; choose another --out")


def write(out: Path, record: dict[str, Any]) -> None:
    """Write the file, and make its folder, unless a former start did."""
    path = out / RECORD
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps(record, indent=1).encode() + b"\n")


def pruned_in(folder: Path) -> str:
    """The hash of the checkpoint that a folder's pruning prunes; empty where there is none that can be read."""
    try:
        return str(_read(folder / RECORD)["of"])
    except (OSError, InputError):
        return ""


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
        assert record["wish"].keys() and record["settings"].keys() and record["of"]
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise InputError(f"{path}: is damaged; remove {path.parent}, or choose another --out") from error
    return record


def _change(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs, in words; empty if nothing does."""
    if before.get("version") != now["version"]:
        return f"version {before.get('version')} of pruning, and this is {now['version']}"
    if before["of"] != now["of"]:
        return "another last checkpoint of the run"
    for name in sorted(now["wish"].keys() & before["wish"].keys()):
        was, value = before["wish"][name], now["wish"][name]
        if was != value:
            return f"--{name.replace('_', '-')}={was}, and is now to go on with {value or 'none'}"
    now_settings = json.loads(json.dumps(now["settings"]))
    for key in sorted(now_settings.keys() & before["settings"].keys()):
        if before["settings"][key] != now_settings[key]:
            return f"{key}={before['settings'][key]}, and is now to go on with {now_settings[key]}"
    return ""
