"""The last checkpoint of a complete run: a round never follows from an earlier one that happens to be intact."""

from __future__ import annotations

from pathlib import Path

from largescale.checkpoint.folder import Checkpoint, folder_of, open_checkpoint
from largescale.processes import on_rank_0, rank, together, world_size
from largescale.run.status import COMPLETE, status_of
from shards.ground.errors import InputError


def last_checkpoint(run: Path, remedy: str) -> Checkpoint:
    """The checkpoint of a complete run's last step, the same on all ranks, which share the work of checksums.

    Args:
        run: its folder.
        remedy: what to do if that checkpoint is damaged or missing; `{path}` stands for its folder.

    Raises:
        InputError: the run is not complete, or that checkpoint is damaged or missing.

    Collectives: every rank must call it; a broadcast and an all-gather of objects.
    """
    checkpoint = on_rank_0(lambda: _last(run, remedy))

    def require_whole() -> None:
        if damage := checkpoint.damage(rank(), world_size()):
            raise _damaged(checkpoint.path, damage, remedy)

    together(require_whole)
    return checkpoint


def _last(run: Path, remedy: str) -> Checkpoint:
    status = status_of(run)
    if status.state != COMPLETE:
        raise InputError(f"{run}: {status}; finish its training first: largescale pretrain {run / 'config.yaml'}")
    path = folder_of(run / "checkpoints", status.steps)
    checkpoint = open_checkpoint(path)
    if checkpoint is None or checkpoint.step != status.steps:
        raise _damaged(path, "progress.json cannot be read" if path.exists() else "no such checkpoint", remedy)
    return checkpoint


def _damaged(path: Path, damage: str, remedy: str) -> InputError:
    return InputError(f"{path}: {damage}; it is the run's last, which is pruned: {remedy.format(path=path)}")
