"""Requests to stop: the scheduler's signals, Ctrl-C, a closed terminal, and the job's time limit.

While a run trains, a signal to any rank is only noted. The ranks agree at the end of a step (`Engine.check` carries
each rank's request), save a checkpoint and exit with 85; the same command continues. Ctrl-C before the first
step, or a second one at any time, ends the process at once.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from largescale.distributed.bounded import within
from shards.ground import pauses
from shards.ground.errors import InputError
from shards.ground.worker_processes import die_with_parent

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
FROM_TERMINAL = (signal.SIGINT, signal.SIGHUP)
"""Ctrl-C and a closed terminal; left ignored if the parent ignores them (nohup, the background of a script)."""
INTERRUPTED = 130
"""Exit code of a process ended by Ctrl-C, as in shells."""

_SAME_PRESS_S = 1.0
"""A launcher may pass on a Ctrl-C that the terminal has already sent to all its processes."""
_UNANSWERED_S = 5.0
"""Time for the interpreter to act on Ctrl-C during the start; a call into a library may block it for long."""
_DATA_GRACE_S = 15.0
"""Time that a rank which is to stop goes on waiting for data, with which it could do its last step."""

_LAST_WORDS_S = 5.0
"""Time to write why the process ends."""

_log = logging.getLogger(__name__)
_received: list[str] = []
_since: list[float] = []
_give_up_at: list[float] = []
"""When a rank that waits for data leaves because its time ends (monotonic clock)."""
_grace_of_time = [0.0]
"""How long it waits in any case, should a long step have taken it beyond that."""
_training = threading.Event()
_over = threading.Event()
_last_words: list[Callable[[str, str], None]] = []


class StoppedInOrder(Exception):
    """The run was asked to stop, and has saved; the same command continues it."""


class StoppedWaiting(StoppedInOrder):
    """It was asked to stop while waiting for something that did not come, and saved nothing more."""


def listen() -> None:
    """Note signals from here on. To be called before anything slow is imported: until then they kill."""
    _over.clear()
    for number in (*SIGNALS, *FROM_TERMINAL):
        if number in SIGNALS or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _note)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # The interpreter runs `_note` only between two lines of Python; a thread hears of a signal at any time.
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_listen_for_ctrl_c, args=(reading,), name="Ctrl-C", daemon=True).start()
    pauses.let_go_by(leave_without_data)
    atexit.register(_ignore)  # the first of all, so the last to be called


def nothing_left() -> None:
    """Interrupt nothing more: the command has ended, its libraries tidy up. Ctrl-C twice still ends that at once."""
    _over.set()


def _ignore() -> None:
    """At the very end, when Python gives signals back their default, Ctrl-C would only change the exit code."""
    for number in (*SIGNALS, *FROM_TERMINAL):
        if signal.getsignal(number) is _note:
            signal.signal(number, signal.SIG_IGN)


def _note(number: int, _frame: object) -> None:
    again = "Ctrl-C" in _received  # ends the process, if it is not the same press: see `_listen_for_ctrl_c`
    _received.append("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
    _since.append(time.monotonic())
    if number == signal.SIGINT and not (again or _training.is_set() or _over.is_set()):
        raise KeyboardInterrupt


def _listen_for_ctrl_c(pipe: int) -> None:
    first = 0.0
    while True:
        for number in os.read(pipe, 64):
            now = time.monotonic()
            if number != signal.SIGINT or (first and now - first < _SAME_PRESS_S):
                continue
            if first:
                _end_at_once("interrupted twice; the same command continues from the last checkpoint")
            first = now
            if _training.is_set():
                _say("stopping after this step, with a checkpoint; press Ctrl-C again to quit at once")
            else:
                threading.Timer(_UNANSWERED_S, _end_if_unanswered).start()


def _end_if_unanswered() -> None:
    if "Ctrl-C" not in _received:
        _end_at_once("interrupted")


def _end_at_once(why: str) -> None:
    _say(f"error: {why}")
    say_last_words("stopped", why)
    os._exit(INTERRUPTED)


def say_last_words(state: str, why: str) -> None:
    """Write the last words that `in_steps` asked for; to be called before `os._exit` in the middle of steps.

    A file system that does not answer, which may be why the process ends, holds this up for some seconds only.
    """
    for tell in _last_words:
        with suppress(Exception):
            within(_LAST_WORDS_S, partial(tell, state, why))


def own_rank() -> int:
    """The rank that a launcher gave this process; 0 if there is none (or nonsense, which is refused later)."""
    number = os.environ.get("RANK", "")
    return int(number) if number.isdecimal() else 0


def _say(text: str) -> None:
    if own_rank() == 0:
        with suppress(OSError, ValueError):
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


@contextmanager
def in_steps(last_words: Callable[[str, str], None]) -> Iterator[None]:
    """While steps run, treat Ctrl-C as a request like the others.

    Args:
        last_words: called with the run's state and the reason if the process ends without leaving this block.
    """
    _training.set()
    _last_words.append(last_words)
    try:
        yield
    finally:
        _last_words.remove(last_words)
        _give_up_at.clear()
        _training.clear()


@contextmanager
def held() -> Iterator[None]:
    """Hold back signals while a process is forked, until `live_and_die_with_parent` ignores them there.

    One that came in between would be written to the pipe shared with the parent, and count twice.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*SIGNALS, *FROM_TERMINAL))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def live_and_die_with_parent(*_: object) -> None:
    """For loader processes: leave signals to the rank that needs them for its last step, and be killed when it dies.

    A process that outlived its rank would keep the rank's connections open, and the other ranks would wait for it.
    """
    signal.set_wakeup_fd(-1)
    _received.clear()
    _give_up_at.clear()
    for number in (*SIGNALS, *FROM_TERMINAL):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*SIGNALS, *FROM_TERMINAL))
    die_with_parent()


def seconds_left(time_limit_s: float, started: float) -> float:
    """Seconds that this job may still run: `run.time_limit_s` from its start, or what SLURM says; inf if unlimited."""
    ends = [float(os.environ.get("SLURM_JOB_END_TIME") or "inf")]
    if time_limit_s > 0:
        ends.append(started + time_limit_s)
    return min(ends) - time.time()


def check_job_time(margin_s: float) -> None:
    """Refuse a SLURM job whose whole time is within the margin: it would be requeued after every single step.

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
    """Why this rank wants to stop; empty if it does not.

    Args:
        left_s: seconds that its job may still run.
        margin_s: of these are for stopping.
    """
    _grace_of_time[0] = min(_DATA_GRACE_S, margin_s / 2)
    _give_up_at[:] = [time.monotonic() + left_s - margin_s + _grace_of_time[0]]
    if _received:
        return _received[0]
    return "its time limit" if left_s < margin_s else ""


def asking(time_limit_s: float, started: float, margin_s: float) -> Callable[[], str]:
    """What says whenever it is called why this rank wants to stop; see `seconds_left` and `reason`."""
    return lambda: reason(seconds_left(time_limit_s, started), margin_s)


def asked_for_s() -> float:
    """Seconds since a signal asked to stop; 0 if none did."""
    return time.monotonic() - _since[0] if _since else 0.0


def leave_if_asked(doing: str, grace_s: float = 0.0, waiting_since: float = 0.0) -> None:
    """Leave if a signal asked to; to be called from time to time while waiting for what may never come.

    Args:
        doing: what this rank waits for, in words.
        grace_s: time that it may still take to come, from when it was asked to stop.
        waiting_since: when the wait began, on the monotonic clock, if that was later: a long step is not a wait.

    Raises:
        StoppedWaiting: a signal asked to stop, more than `grace_s` ago, or the job's time ends.
    """
    if _received and time.monotonic() - max(_since[0], waiting_since) >= grace_s:
        raise StoppedWaiting(f"stopped by {_received[0]} while {doing}")
    if _give_up_at and time.monotonic() >= max(_give_up_at[0], waiting_since + min(grace_s, _grace_of_time[0])):
        raise StoppedWaiting(f"stopped by the end of its time while {doing}")


def leave_without_data(waiting_since: float = 0.0) -> None:
    """`leave_if_asked` for a rank that waits for its next batch, or for shards when it starts."""
    if _training.is_set():
        doing = "waiting for data; steps since the last checkpoint will be repeated"
        leave_if_asked(doing, _DATA_GRACE_S, waiting_since)
    else:
        leave_if_asked("waiting for data")
