"""Which configurations belong to one run: what may differ when it is resumed, and what makes it another run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from largescale.config import Config, corpus_settings, flatten, free_keys, values_saved_before
from largescale.data.supports import parts_of

_OTHER_SHARDS = "trained on other shards"


def changed_setting(before: dict[str, Any], config: Config) -> str:
    """The first setting that keeps a configuration from continuing one saved earlier; empty if none does.

    Args:
        before: all values by the keys of this version, see `values_saved_before`.
    """
    now = flatten(config)
    return next((key for key in sorted(now.keys() - free_keys(config)) if before[key] != now[key]), "")


def changed_weights(before: dict[str, Any], config: Config) -> tuple[list[float], list[float]] | None:
    """Weights of `data.shards` before and now, if nothing else of it differs; None if it does, or they do not."""
    shards = before["data.shards"], config.data.shards
    if not all(isinstance(one, list) for one in shards):
        return None
    was, now = (corpus_settings(replace(config.data, shards=one, subset="")) for one in shards)
    weights = [weight for _, weight, _ in was], [weight for _, weight, _ in now]
    ratios, own_ratios = ([round(weight / min(of), 9) for weight in of] for of in weights)  # only these count
    same = [(place, subset) for place, _, subset in was] == [(place, subset) for place, _, subset in now]
    return weights if same and ratios != own_ratios else None


def other_run(progress: dict[str, Any], config: Config, fingerprint: str) -> str:
    """Why a checkpoint belongs to another run, in words; empty if this run can continue from it.

    Args:
        progress: of the checkpoint.
        config: of this run.
        fingerprint: of the shards that this run trains on.
    """
    try:
        (images, supports), (own_images, own_supports) = parts_of(progress["data"]), parts_of(fingerprint)
        before = values_saved_before(progress["config"], config)
        if images != own_images:
            weights = changed_weights(before, config)
            return "weights in data.shards are {} there and {} here".format(*weights) if weights else _OTHER_SHARDS
        key = changed_setting(before, config)
        if key:
            return f"{key} is {before[key]} there and {flatten(config)[key]} here"
        return "trained with other labelled images" if supports != own_supports else ""
    except (AttributeError, KeyError, TypeError):
        return "not a checkpoint of this version"
