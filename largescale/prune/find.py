"""Finds the mask of a round in the checkpoint of the one before, each rank in its own pieces of the weights."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from largescale.checkpoint import sharded
from largescale.checkpoint.folder import Checkpoint
from largescale.config import Config
from largescale.data.random import hash_coordinates
from largescale.models.backbones import build_backbone
from largescale.optim.lars import local_piece
from largescale.parallel.masks import own_piece
from largescale.processes import rank
from largescale.prune.threshold import magnitudes, prune_smallest

_MODEL = "model.backbone."
_MASK_PURPOSE = 7001
"""Coordinate of the hashes that draw masks; no other draw has it."""


def convolutions(config: Config) -> list[str]:
    """The backbone's parameters that are pruned, by name: weights of convolutions; no biases or normalisation."""
    with torch.device("meta"):
        backbone, _ = build_backbone(config.model)
    return [f"{name}.weight" for name, module in backbone.named_modules() if isinstance(module, nn.Conv2d)]


def weights_of(checkpoint: Checkpoint, names: list[str]) -> dict[str, DTensor]:
    """These weights of a checkpoint, cut along their first axis over all ranks, on the host.

    Raises:
        InputError: they are not in it.

    Collectives: every rank must call it; those of loading a checkpoint.
    """
    there = sharded.in_pieces(checkpoint)
    state = {key: there[key] for key in (f"{_MODEL}{name}" for name in names)}
    sharded.load(checkpoint, state)
    found = {}
    for name in names:
        value = state[f"{_MODEL}{name}"]
        assert isinstance(value, DTensor)
        found[name] = value
    return found


def smaller(
    weights: Mapping[str, DTensor], kept: Mapping[str, Tensor], num: int, *, drawn: int | None = None
) -> dict[str, Tensor]:
    """Masks with `num` weights fewer: those of the smallest magnitude, or drawn ones.

    Args:
        weights: from `weights_of`.
        kept: whole masks, the same on all ranks.
        num: of weights.
        drawn: seed of a draw; None prunes by magnitude.

    Returns:
        Whole masks on rank 0, empty on others.

    Collectives: every rank must call it; those of `prune_smallest`, and an all-gather per parameter.
    """
    pieces = {name: own_piece(kept[name], weight).flatten() for name, weight in weights.items()}
    if drawn is None:
        scores = {name: magnitudes(weight.to_local()).flatten() for name, weight in weights.items()}
    else:
        scores = {name: _drawn(weight, drawn, name) for name, weight in weights.items()}
    found = prune_smallest(scores, pieces, num)
    return {name: mask for name, weight in weights.items() if (mask := _whole(found[name], weight)) is not None}


def _drawn(weight: DTensor, seed: int, name: str) -> Tensor:
    """A number for each weight of this rank's piece: a hash of seed, name and place, of 63 bits."""
    local = weight.to_local()
    row = weight.shape[1:].numel()
    rows_per_rank = -(-weight.shape[0] // weight.device_mesh.size())
    places = torch.arange(local.numel()) + min(rank() * rows_per_rank, weight.shape[0]) * row
    hashes = hash_coordinates(seed, _MASK_PURPOSE, zlib.crc32(name.encode()), places.numpy())
    return torch.from_numpy((hashes >> 1).astype("int64"))


def _whole(piece: Tensor, weight: DTensor) -> Tensor | None:
    """A mask in one piece, on rank 0. Collectives: one all-gather."""
    bytes_ = piece.view(weight.to_local().shape).to(torch.uint8)
    cut = DTensor.from_local(
        bytes_, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )
    whole = cut.full_tensor()
    return whole.bool() if rank() == 0 else None


def masked_pieces(state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set to zero, in place, what masks say of tensors that ranks hold in pieces, both by name. Collectives: none."""
    for name, mask in masks.items():
        local_piece(state[name]).masked_fill_(~own_piece(mask, state[name]), 0)
