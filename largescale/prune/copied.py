"""The masks of another pruning, for the rounds of this one: all are checked before the first is copied."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from largescale.checkpoint.mask_file import hash_of, read_mask
from largescale.checkpoint.state_file import read_state
from largescale.config import Config
from largescale.prune.rounds import Pruning
from largescale.prune.wish import WEIGHTS
from shards.ground.errors import InputError


def check_masks(pruning: Pruning) -> None:
    """Check that all rounds have a mask to take, for this backbone, and that those copied before came from there.

    Raises:
        InputError: there are too few, one does not fit, or another was copied before.
    """
    assert pruning.masks is not None
    sources = [pruning.mask_to_copy(one.number) for one in pruning.rounds()]
    there = next((number for number, source in enumerate(sources) if not source.is_file()), len(sources))
    copied = [one for one in pruning.rounds() if one.mask_path.is_file()]
    if there < len(sources) and len(copied) < len(sources):
        raise InputError(_too_few(pruning, there))
    for one, source in zip(pruning.rounds(), sources[:there], strict=False):
        found = hash_of(_masks_in(pruning.config, source))
        if one.mask_path.is_file() and found != hash_of(read_state(one.mask_path).tensors):
            raise InputError(
                f"{one.mask_path}: another mask than {source}; pass the --masks of before, or another --out"
            )


def _too_few(pruning: Pruning, there: int) -> str:
    if there == 0:
        return f"{pruning.mask_to_copy(1)}: no such mask; prune the run without --random {WEIGHTS}, or pass --masks DIR"
    return (
        f"--rounds={pruning.wish.rounds}: {pruning.masks} has masks of {there} rounds; pass --rounds={there}, or add "
        f"rounds there first"
    )


def _masks_in(config: Config, path: Path) -> dict[str, Tensor]:
    return read_mask(replace(config, model=replace(config.model, mask=str(path))))
