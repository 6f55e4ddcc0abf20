"""What settings for the training of rounds may not replace: the network, and with rewinding whatever a run cannot
change when it goes on.
"""

from __future__ import annotations

from typing import Any

from largescale.checkpoint.folder import Checkpoint
from largescale.config import Config, flatten, values_saved_before
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


def _before(checkpoint: Checkpoint, config: Config) -> dict[str, Any]:
    return values_saved_before(checkpoint.progress["config"], config)
