"""Requests to stop in order: the scheduler's signals, and the end of the time that the job may run.

A signal may reach any rank at any moment; it is only noted. The ranks agree at the end of a step (`Engine.check`
carries each rank's wish), save a checkpoint and leave with exit code 85; the same command continues.
"""

from __future__ import annotations

import os
import signal
import time

from shards.errors import InputError
from shards.processes import die_with_parent

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

_received: list[str] = []


def listen() -> None:
    """Note the signals from here on. To be called before anything slow is imported: until then they kill."""
    for number in SIGNALS:
        signal.signal(number, lambda caught, _frame: _received.append(signal.Signals(caught).name))


def live_and_die_with_parent(*_: object) -> None:
    """For loader processes: leave signals to the rank that needs them for its last step, and be killed when it dies.

    One that outlived its rank would keep the rank's connections open, and the others would wait for it.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()


def seconds_left(time_limit_s: float, started: float) -> float:
    """Seconds that this job may still run: `run.time_limit_s` from its start, or what SLURM says; inf if unlimited."""
    ends = [float(os.environ.get("SLURM_JOB_END_TIME") or "inf")]
    if time_limit_s > 0:
        ends.append(started + time_limit_s)
    return min(ends) - time.time()


def check_job_time(margin_s: float) -> None:
    """Refuse a SLURM job whose whole time is within the margin: it would be queued again after every single step.

    Raises:
        InputError: naming both times.
    """
    start, end = (float(os.environ.get(f"SLURM_JOB_{name}_TIME") or "nan") for name in ("START", "END"))
    if end - start <= margin_s:  # False where SLURM does not say
        raise InputError(
            f"run.stop_before_s={margin_s:g}: expected less than the {end - start:g} s that SLURM gives this job; "
            f"lower it, or submit with a longer --time"
        )


def reason(left_s: float, margin_s: float) -> str:
    """Why this rank wants to stop; empty if it does not."""
    if _received:
        return _received[0]
    return "the end of its time" if left_s < margin_s else ""
