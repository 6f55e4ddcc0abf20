"""`python -m largescale.distributed.start_ranks`: torchrun, with its arguments, and without its own traceback.

What ranks say is theirs, tracebacks too; torchrun would add one of itself whenever a rank fails or a signal ends it.
This one ends with the exit code of the rank that failed first, and says in a line which rank a signal has killed.
No rank outlives it: torchrun forgets those that it was starting when a signal came.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from largescale.distributed import threads
from shards.ground.errors import InputError
from shards.ground.terminal import fail_line

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_WHY: dict[int, str] = {
    signal.SIGKILL: "by hand, or by the kernel because memory ran out: lower data.workers or data.prefetch, "
    "or start fewer ranks on this machine; for a new run, lower train.global_batch or raise train.accumulate"
}
_USER_ERROR = 2
_OWN_THREADS = 6
_GRACE_S = 30.0
"""As torchrun gives its ranks between the signal and SIGKILL."""
_CRASHED = "a library crashed; PYTHONFAULTHANDLER=1 in the environment shows where"


def main(arguments: list[str] | None = None) -> int:
    """Start ranks as torchrun does and wait for them; returns the exit code: of a signal 128 and its number."""
    try:
        of_ranks = _num_ranks(arguments or sys.argv[1:]) * (1 + threads.COMMAND + threads.GROUPS)
        threads.require(_OWN_THREADS + of_ranks)
    except InputError as error:
        return fail_line(str(error), _USER_ERROR)
    # Imported late: it starts threads, too.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    before = _children()
    try:
        torchrun(arguments)
    except SignalException as asked:
        _end_forgotten(asked.sigval, before)
        return 128 + int(asked.sigval)
    except ChildFailedError as failed:
        return _of_first(*failed.get_first_failure())
    return 0


def _num_ranks(arguments: list[str]) -> int:
    """As many as are asked for by number; one where torchrun is to count devices."""
    asked = re.search(r"--nproc[-_]per[-_]node[= ](\d+)\b", " ".join(arguments))
    return int(asked.group(1)) if asked else 1


def _end_forgotten(number: int, before: set[int]) -> None:
    """End the ranks that are still there after torchrun has waited for those it knows: first as they were asked to; at
    once when another signal comes.

    Args:
        number: of the signal that they are sent.
        before: processes that are no ranks.
    """
    give_up_at = time.monotonic() + _GRACE_S

    def give_up(*_: object) -> None:
        nonlocal give_up_at
        give_up_at = 0.0

    for another in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(another, give_up)
    asked: set[int] = set()
    while left := {pid for pid in _children() - before if not _has_ended(pid)}:
        how = signal.SIGKILL if time.monotonic() > give_up_at else number
        for pid in left if how == signal.SIGKILL else left - asked:
            with suppress(ProcessLookupError):
                os.kill(pid, how)
        asked |= left
        time.sleep(0.05)


def _children() -> set[int]:
    """Processes that the main thread started and has not collected. Linux only."""
    own = Path(f"/proc/self/task/{os.getpid()}/children")
    return set(map(int, own.read_text().split())) if own.exists() else set()


def _has_ended(pid: int) -> bool:
    """Whether a rank has; it is collected then."""
    try:
        return os.waitpid(pid, os.WNOHANG) != (0, 0)
    except ChildProcessError:
        return True


def _of_first(rank: int, failure: ProcessFailure) -> int:
    if failure.exitcode >= 0:
        return failure.exitcode  # it has said why
    number = -failure.exitcode
    why = _WHY.get(number, _CRASHED)
    return fail_line(
        f"rank {rank} (pid {failure.pid}) was killed by {signal.Signals(number).name}; {why}", 128 + number
    )


if __name__ == "__main__":
    sys.exit(main())
