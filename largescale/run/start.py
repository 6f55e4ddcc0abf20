"""Records in the run's status a start that ends before its first step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from largescale.distributed.stopping import StoppedInOrder
from largescale.run.failures import is_lost_rank, reason_of
from largescale.run.lease import FolderLost, Lease
from largescale.run.status import COMPLETE, read_status, write_status
from shards.ground.errors import InputError


@contextmanager
def start_in_status(lease: Lease) -> Iterator[None]:
    """Record in `status.json` how a start ended that did no step; on any rank, since others may not know.

    A complete run stays complete, and a refused command leaves nothing behind if nothing had started. What
    the steps recorded themselves (see `failures.told`) is kept.
    """
    before = _row(lease)
    try:
        yield
    except BaseException as error:
        if type(error) is StoppedInOrder:
            raise  # all ranks stopped after a step, and rank 0 records it: maybe only after this one has looked
        row = _row(lease)
        began = row is not None or not isinstance(error, InputError | KeyboardInterrupt | StoppedInOrder)
        untold = row == before or (row is not None and row["state"] == "running")
        complete = row is not None and row["state"] == COMPLETE
        if began and untold and not complete and not is_lost_rank(error) and not isinstance(error, FolderLost):
            stopped = isinstance(error, KeyboardInterrupt | StoppedInOrder)
            row = row or {"step": 0, "steps": 0}
            with suppress(OSError):
                if lease.still_ours():
                    write_status(
                        lease.run_dir,
                        "stopped" if stopped else "failed",
                        row["step"],
                        row["steps"],
                        saved=row.get("saved"),
                        reason=str(error) or "interrupted" if stopped else reason_of(error),
                    )
        raise


def _row(lease: Lease) -> dict[str, Any] | None:
    with suppress(OSError, InputError):
        return read_status(lease.run_dir)
    return None
