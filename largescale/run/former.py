"""A new run in the folder of an earlier one: what the earlier one left is set aside, neither mixed nor lost."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

from largescale.checkpoint.folder import ROLLBACKS
from largescale.config import Config, flatten, free_keys, load_config
from largescale.observe.metrics import METRICS
from largescale.run.status import STATUS, read_status
from shards.ground.errors import InputError

_log = logging.getLogger(__name__)

_RESULTS = ("eval", "report.html", ROLLBACKS)
"""Files that only a run with a checkpoint writes."""
_WRITTEN = (
    METRICS,
    "tensorboard",
    "audit",
    "skipped",
    "trouble",
    "stacks",
    "environment.json",
    "init.json",
    "trackers.json",
    "wandb",
    *_RESULTS,
    STATUS,
    "config.yaml",
)
_UNDER_WAY = ".former.writing"


def set_aside_former(run_dir: Path, config: Config) -> None:
    """Move what an earlier run wrote to `former-N/`, for a run that starts at step 0 without a checkpoint.

    A run that was killed before its first checkpoint is not a former one: it simply starts again.
    """
    moving = run_dir / _UNDER_WAY
    if not moving.exists() and not _is_former(run_dir, config):
        return
    moving.mkdir(exist_ok=True)  # it exists if this was interrupted
    for name in _WRITTEN:
        with suppress(FileNotFoundError):
            os.rename(run_dir / name, moving / name)
    number = 1
    while (former := run_dir / f"former-{number}").exists():
        number += 1
    os.rename(moving, former)
    _log.warning(
        "%s: the checkpoints of an earlier run are gone, so this run starts over; what else that run left is in %s",
        run_dir,
        former,
    )


def _is_former(run_dir: Path, config: Config) -> bool:
    if any((run_dir / name).exists() for name in _RESULTS):
        return True
    with suppress(InputError):
        row = read_status(run_dir)
        if row and (row.get("saved") or row["state"] not in ("running", "stopped", "failed")):
            return True
    metrics = run_dir / METRICS
    trained = metrics.exists() and metrics.stat().st_size > 0
    return trained and _differs(run_dir / "config.yaml", config)


def _differs(path: Path, config: Config) -> bool:
    """Whether another run wrote this configuration."""
    try:
        before, now = flatten(load_config(path)), flatten(config)
    except (OSError, InputError):
        return True
    return any(before[key] != now[key] for key in now.keys() & before.keys() - free_keys(config))
