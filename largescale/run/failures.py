"""How a run ends when it cannot continue: what kind of failure it is, and a record of it in `status.json`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from largescale.data.loader import LoaderDied
from largescale.distributed import stopping
from largescale.distributed.out_of_memory import OutOfMemory, is_out_of_memory, line_of_limit, line_of_memory
from shards.ground.errors import InputError, line_of

_LOST_LINE = "lost another rank; that one's own lines say why, or the launcher's where it was killed"
_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "connection was likely closed",
    "broken pipe",
    "remote process exit",
    "timed out waiting",
    "wait timeout",
)
"""What gloo, NCCL and the ranks' store say when another rank is gone or does not come."""


class TrainingStopped(Exception):
    """The run cannot continue; its last checkpoint is whole, and the message says what happened."""


def is_lost_rank(error: BaseException) -> bool:
    """Whether a rank fails only because another one is gone; that one knows why."""
    text = str(error).lower()
    of_ranks = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text)
    return of_ranks and any(words in text for words in _LOST)


def line_of_ranks(error: BaseException) -> str:
    """The line for an error of what connects the ranks; empty if it is another one."""
    text = " ".join(str(error).split())[:300]
    if is_lost_rank(error):
        return f"{_LOST_LINE} ({text})"
    return f"{type(error).__name__}: {text}; NCCL_DEBUG=WARN shows more" if isinstance(error, dist.DistError) else ""


def reason_of(error: BaseException) -> str:
    """An error in one line, with its type if the text alone would not explain it."""
    if isinstance(error, InputError | LoaderDied | OutOfMemory | TrainingStopped):
        return line_of(error)
    if limit := line_of_limit(error):
        return limit
    if is_out_of_memory(error):
        return line_of_memory(error)
    if isinstance(error, OSError):
        return line_of(error)
    if line := line_of_ranks(error):
        return line
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def end_of(error: Exception) -> tuple[str, bool] | None:
    """The line that a command ends with after an error, and whether the user can fix it; None for a bug, whose
    traceback is needed.
    """
    if isinstance(error, TrainingStopped | LoaderDied | OutOfMemory):
        return str(error), False
    if limit := line_of_limit(error):
        return limit, True
    if is_out_of_memory(error):
        return line_of_memory(error), False
    if isinstance(error, OSError):
        return line_of(error), True
    if line := line_of_ranks(error):
        return line, False
    return None


@contextmanager
def told(write: Callable[[str, str], None], state: Callable[[], str]) -> Iterator[None]:
    """Record how this block ends, whatever happens; on any rank, since others may not know.

    Args:
        write: given the run's state (`failed` or `stopped`) and the reason.
        state: what is recorded now. A rank that lost another one does not overwrite what that one wrote.
    """
    with stopping.in_steps(write):
        try:
            yield
        except (KeyboardInterrupt, stopping.StoppedWaiting) as error:
            write("stopped", str(error) or "interrupted")
            raise
        except (stopping.StoppedInOrder, GeneratorExit):
            raise
        except BaseException as error:
            if not is_lost_rank(error) or state() not in ("failed", "stopped"):
                write("failed", reason_of(error))
            raise
