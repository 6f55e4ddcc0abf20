"""Goes back to an early step of a run: its checkpoint, with pruned weights and their momentum at zero, in a new run's
folder, from which `pretrain` continues as from one of its own.

So the schedule, the order of images, statistics, queues and what else a method carries are those of that step.

Source: arXiv 2001.03554, section 3; rewinding is that of arXiv 1903.01611.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from largescale.checkpoint import sharded
from largescale.checkpoint.folder import Checkpoint, folder_of, named_steps, open_checkpoint
from largescale.checkpoint.mask_file import by_tensor, hash_of, share_left
from largescale.checkpoint.saver import SaveFailed, Saver
from largescale.config import Config, flatten
from largescale.methods import build_method
from largescale.processes import collective_timeout
from largescale.prune.find import masked_pieces
from largescale.run.lease import lease_of
from largescale.run.rollback import rows_of
from shards.ground.errors import InputError


def kept_step(run: Path, step: int) -> Checkpoint:
    """The checkpoint of a step that a run has kept.

    Raises:
        InputError: it has not, or it is damaged.
    """
    folder = run / "checkpoints"
    checkpoint = open_checkpoint(folder_of(folder, step))
    if checkpoint is None:
        there = ", ".join(str(number) for number in reversed(named_steps(folder))) or "none"
        raise InputError(
            f"--rewind={step}: {run} has no checkpoint of that step, but of {there}; take one of these, or train "
            f"again with checkpoint.every_steps={step} checkpoint.keep_every={step}"
        )
    if damage := checkpoint.damage():
        raise InputError(f"--rewind={step}: {checkpoint.path}: {damage}; rewind to another step")
    return checkpoint


@torch.no_grad()
def write_rewound(source: Checkpoint, config: Config, masks: dict[str, Tensor]) -> None:
    """Write the checkpoint that a round continues from, whole or not at all.

    Args:
        source: the kept checkpoint.
        config: of the round.
        masks: of the round, whole, by names of the backbone's parameters; the same on all ranks.

    Raises:
        InputError: it cannot be written, or another training owns the folder.

    Collectives: every rank must call it; those of loading and saving a checkpoint.
    """
    state = sharded.in_pieces(source)
    sharded.load(source, state)
    method = build_method(config, on_meta=True)
    masked_pieces(state, by_tensor(method, masks, sharded.shapes(source)))
    folder = Path(config.run.dir) / "checkpoints"
    with lease_of(config) as lease:
        saver = Saver(
            folder,
            keep=1,
            keep_every=0,
            background=False,
            device=torch.device("cpu"),
            owner=lease.number,
            verify=lease.verify,
            timeout=collective_timeout(config.run.hang_timeout_s),
        )
        try:
            saver.save(state, _progress(source, config, masks), until_update=set())
        except SaveFailed as error:
            raise InputError(f"{folder}: cannot save the step to rewind to: {error}") from error


def _progress(source: Checkpoint, config: Config, masks: dict[str, Tensor]) -> dict[str, Any]:
    mask = {"sha256": hash_of(masks), "share_left": share_left(masks)}
    left_out = {"rollbacks": rows_of(source)}  # also what the run left out after the step was saved
    return {**source.progress, **left_out, "config": flatten(config), "mask": mask, "rewound_to": source.content_hash}
