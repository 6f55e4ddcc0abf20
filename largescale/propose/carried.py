"""What a proposed recipe takes over of the network and of BatchNorm from the recipe that it follows."""

from __future__ import annotations

from typing import Any, NamedTuple

from largescale.config import Config
from largescale.propose.references import changed_values

_NETWORK, _BATCHNORM = ("weights", "recompute_stages", "compile_stages"), ("sync_batchnorm", "batchnorm_group_size")
"""Keys of `model` that say where weights come from and how they are computed, not what is trained; of `parallel` those
that change what is trained."""


class Carried(NamedTuple):
    """Values by dotted keys.

    Attributes:
        kept: what the recipe has as well.
        left_out: what does not go with its network or its number of GPUs.
    """

    kept: dict[str, Any]
    left_out: dict[str, Any]


def carried(following: Config, backbone: str, gpus: int) -> Carried:
    """What to keep of a recipe's `model` and `parallel` for a backbone on so many GPUs, and what cannot be kept."""
    found = Carried({}, {})
    for key, value in changed_values(following.model).items():
        if key not in ("backbone", *_NETWORK):
            there = found.kept if backbone == following.model.backbone else found.left_out
            there[f"model.{key}"] = value
    for key, value in changed_values(following.parallel).items():
        if key in _BATCHNORM and gpus:
            fits = key != "batchnorm_group_size" or gpus % value == 0
            there = found.kept if fits else found.left_out
            there[f"parallel.{key}"] = value
    return found
