"""Which configurations belong to one run: what may differ when it is resumed, and what makes it another run."""

from __future__ import annotations

from typing import Any

from largescale.config import Config, flatten, free_keys, values_saved_before
from largescale.data.supports import parts_of


def changed_setting(before: dict[str, Any], config: Config) -> str:
    """The first setting that keeps a configuration from continuing one saved earlier; empty if none does.

    Args:
        before: all values by the keys of this version, see `values_saved_before`.
    """
    now = flatten(config)
    return next((key for key in sorted(now.keys() - free_keys(config)) if before[key] != now[key]), "")


def other_run(progress: dict[str, Any], config: Config, fingerprint: str) -> str:
    """Why a checkpoint belongs to another run, in words; empty if this run can continue from it.

    Args:
        progress: of the checkpoint.
        config: of this run.
        fingerprint: of the shards that this run trains on.
    """
    try:
        (images, supports), (own_images, own_supports) = parts_of(progress["data"]), parts_of(fingerprint)
        if images != own_images:
            return "trained on other shards"
        before = values_saved_before(progress["config"], config)
        key = changed_setting(before, config)
        if key:
            return f"{key} is {before[key]} there and {flatten(config)[key]} here"
        return "trained with other labelled images" if supports != own_supports else ""
    except (AttributeError, KeyError, TypeError):
        return "not a checkpoint of this version"
