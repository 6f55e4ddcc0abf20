"""A run begun again in the folder of a former one: what the former left there is set aside, not mixed or lost."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

import yaml

from largescale.checkpoint.folder import ROLLBACKS
from largescale.config import Config, to_yaml
from largescale.observe.metrics import METRICS
from largescale.run.status import STATUS, read_status
from shards.errors import InputError

_log = logging.getLogger(__name__)

_RESULTS = ("eval", "report.html", ROLLBACKS)
"""What only a run that has had a checkpoint writes."""
_WRITTEN = (METRICS, "tensorboard", "audit", "skipped", "trouble", "stacks", "environment.json", "init.json",
            *_RESULTS, STATUS, "config.yaml")
_UNDER_WAY = ".former.writing"


def set_aside_former(run_dir: Path, config: Config, free_to_change: tuple[str, ...]) -> None:
    """Move what a former run wrote to `former-N/`, for a run that begins at step 0 without a checkpoint.

    A run that was killed before its first checkpoint is no former one: it begins again as it was.

    Args:
        free_to_change: keys, or their beginnings, in which one run's configurations may differ.
    """
    moving = run_dir / _UNDER_WAY
    if not moving.exists() and not _is_former(run_dir, config, free_to_change):
        return
    moving.mkdir(exist_ok=True)  # where it is there, this was interrupted
    for name in _WRITTEN:
        with suppress(FileNotFoundError):
            os.rename(run_dir / name, moving / name)
    number = 1
    while (former := run_dir / f"former-{number}").exists():
        number += 1
    os.rename(moving, former)
    _log.warning("%s: the checkpoints of a former run are gone, so this one begins anew; what else that run left is "
                 "in %s", run_dir, former)


def _is_former(run_dir: Path, config: Config, free_to_change: tuple[str, ...]) -> bool:
    if any((run_dir / name).exists() for name in _RESULTS):
        return True
    with suppress(InputError):
        row = read_status(run_dir)
        if row and (row.get("saved") or row["state"] not in ("running", "failed")):
            return True
    metrics = run_dir / METRICS
    trained = metrics.exists() and metrics.stat().st_size > 0
    return trained and _differs(run_dir / "config.yaml", config, free_to_change)


def _differs(path: Path, config: Config, free_to_change: tuple[str, ...]) -> bool:
    try:
        before, now = _flat(yaml.safe_load(path.read_text())), _flat(yaml.safe_load(to_yaml(config)))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, AttributeError):
        return True
    return any(key in before and before[key] != value for key, value in now.items()
               if not key.startswith(free_to_change))


def _flat(node: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in node.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
