"""What rounds have in common with the run that is pruned: the network, with rewinding whatever a run cannot change when
it goes on, and without it the weights that it began from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from largescale.checkpoint.folder import Checkpoint, open_checkpoint, stamp_of
from largescale.checkpoint.state_file import read_state
from largescale.config import Config, flatten, values_saved_before
from largescale.run.init_from import sha256_of
from largescale.run.same_run import changed_setting
from shards.ground.errors import InputError

_NOT_ITS_SHAPE = ("model.mask", "model.weights")


def require_same_backbone(trained: Checkpoint, config: Config) -> None:
    """Check that the backbone of rounds is that of the checkpoint that is pruned.

    Raises:
        InputError: naming the setting.
    """
    before, now = _before(trained, config), flatten(config)
    for key in sorted(now):
        if key.startswith("model.") and key not in _NOT_ITS_SHAPE and before[key] != now[key]:
            raise InputError(f"{key}={now[key]}: the run that is pruned has {before[key]}; leave it out")


def require_same_settings(rewound: Checkpoint, config: Config) -> None:
    """Check that rounds may go on from a kept step.

    Args:
        rewound: its checkpoint.
        config: of the rounds, in the precision that they will have.

    Raises:
        InputError: naming the setting.
    """
    before = _before(rewound, config)
    if key := changed_setting(before, config):
        raise InputError(
            f"{key}={flatten(config)[key]}: --rewind={rewound.step} goes on with what the run was trained with there, "
            f"which is {before[key]}; leave one of them out"
        )


def first_weights_of(trained: Checkpoint, config: Config) -> str:
    """`init_from` of rounds that begin as the run did: the very checkpoint, where that names a run that may have gone
    on since.
    """
    began = trained.progress.get("init", {})
    return str(began["checkpoint"]) if _began_there(began, config) else config.init_from


def require_same_start(trained: Checkpoint, config: Config) -> None:
    """Check that the weights which the run began from are still there.

    Raises:
        InputError: they are gone, or others.
    """
    began = trained.progress.get("init", {})
    if _began_there(began, config):
        source = open_checkpoint(Path(began["checkpoint"]).expanduser())
        if source is None or sha256_of(source) != began["sha256"]:
            what = "is gone" if source is None else "has other weights by now"
            raise InputError(
                f"init_from={config.init_from}: the run that is pruned began from {began['checkpoint']}, which {what}; "
                f"restore it, rewind to a kept step (--rewind), or pass another init_from"
            )
    elif config.model.weights and began.get("weights") == config.model.weights:
        path = read_state(config.model.weights).path
        if stamp_of(path).sha256 != began["sha256"]:
            raise InputError(
                f"model.weights={config.model.weights}: the run that is pruned began from this file, which has other "
                f"weights by now; restore it, rewind to a kept step (--rewind), or pass another model.weights"
            )


def _began_there(began: dict[str, Any], config: Config) -> bool:
    return bool(config.init_from) and began.get("init_from") == config.init_from


def _before(checkpoint: Checkpoint, config: Config) -> dict[str, Any]:
    return values_saved_before(checkpoint.progress["config"], config)
