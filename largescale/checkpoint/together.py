"""Actions that succeed on every rank or fail on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from shards.ground.errors import line_of


class FailedOnARank(Exception):
    """An action failed on some rank; the message says why and on which."""


def on_all(group: dist.ProcessGroup, action: Callable[[], Any]) -> list[Any]:
    """Do something on every rank and gather the results.

    Raises:
        FailedOnARank: on all ranks, if it failed on any.

    Collectives: every rank of the group must call it; one all-gather of objects.
    """
    result, failure = None, ""
    try:
        result = action()
    except (Exception, CheckpointException) as error:
        failure = f"{_root_cause(error)} (rank {dist.get_rank()})"
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, (result, failure), group=group)
    failures = [failure for _, failure in outcomes if failure]
    if failures:
        raise FailedOnARank(failures[0])
    return [result for result, _ in outcomes]


def on_first(group: dist.ProcessGroup, action: Callable[[], Any]) -> Any:
    """Do something only on rank 0; every rank gets the result. Otherwise like `on_all`."""
    return on_all(group, lambda: action() if dist.get_rank() == 0 else None)[0]


def _root_cause(error: BaseException) -> str:
    """The one helpful line: torch wraps a rank's error in an exception that prints all tracebacks."""
    if isinstance(error, CheckpointException):
        return "; ".join(str(failure[0]) for failure in error.failures.values())
    return line_of(error)
