"""Which configurations are one run's: what may differ when it is continued, and what shows that it is another run."""

from __future__ import annotations

from typing import Any

from largescale.config import Config, flatten

FREE_TO_CHANGE = (
    "name", "run.dir", "run.log_every", "run.hang_timeout_s", "run.time_limit_s", "run.stop_before_s", "run.lease_s",
    "run.owner_wait_s", "run.join_timeout_s", "data.shards", "data.subset", "data.eval_shards", "data.audit",
    "data.workers", "data.threads", "data.prefetch", "data.cache", "data.fetches", "data.store_", "data.max_skipped",
    "data.max_pixels", "parallel.strategy", "parallel.replicate", "parallel.shard", "parallel.cpu_offload",
    "parallel.batchnorm_group_size",  # as other ranks need it: a line says what it changes
    "parallel.reshard_after_forward", "parallel.unit_min_parameters", "model.recompute_stages", "model.compile_stages",
    "checkpoint.", "evaluate.", "train.max_rollbacks", "train.rollback_window",
)
"""Keys (or groups) that may differ when a run is continued: they do not change what it computes (but for images that
could not be read before, which may be from then on)."""


def free_to_change(key: str) -> bool:
    """Whether a setting may differ when a run is continued."""
    return key.startswith(FREE_TO_CHANGE)


def changed_setting(before: dict[str, Any], config: Config) -> str:
    """The first setting that keeps a configuration from continuing one saved earlier; empty where none does.

    Args:
        before: all values by key, as a checkpoint holds them. Keys that it does not have yet are passed over.
    """
    now = flatten(config)
    return next((key for key in sorted(now) if key in before and not free_to_change(key) and before[key] != now[key]),
                "")


def other_run(progress: dict[str, Any], config: Config, fingerprint: str) -> str:
    """What shows that a checkpoint is of another run, in words; empty where it can be continued.

    Args:
        progress: of the checkpoint.
        config: of this run.
        fingerprint: of the shards that this run trains on.
    """
    try:
        if progress["data"] != fingerprint:
            return "trained on other shards"
        before = progress["config"]
        key = changed_setting(before, config)
        return f"{key} is {before[key]} there and {flatten(config)[key]} here" if key else ""
    except (KeyError, TypeError):
        return "no checkpoint of this version"
