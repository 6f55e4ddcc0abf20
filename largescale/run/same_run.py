"""Which configurations are one run's: what may differ when it is continued, and what shows that it is another run."""

from __future__ import annotations

from typing import Any

from largescale.config import Config, flatten, free_keys, with_present_names


def changed_setting(before: dict[str, Any], config: Config) -> str:
    """The first setting that keeps a configuration from continuing one saved earlier; empty where none does.

    Args:
        before: all values by key, as a checkpoint holds them. Keys that it does not have yet are passed over.
    """
    now, before = flatten(config), with_present_names(before, config)
    return next((key for key in sorted(now.keys() & before.keys() - free_keys(config)) if before[key] != now[key]), "")


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
        before = with_present_names(progress["config"], config)
        key = changed_setting(before, config)
        return f"{key} is {before[key]} there and {flatten(config)[key]} here" if key else ""
    except (KeyError, TypeError):
        return "not a checkpoint of this version"
