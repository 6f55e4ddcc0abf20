"""Waiting that whoever is asked to stop need not sit out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

_SLICE_S = 0.5

_checks: list[Callable[[], None]] = []


def let_go_by(check: Callable[[], None]) -> None:
    """Have `check` called now and then during every wait of this process; what it raises ends the wait."""
    _checks.append(check)


def let_go() -> None:
    """To be called in a loop that waits for what may take long to come."""
    for check in _checks:
        check()


def pause(seconds: float) -> None:
    """Sleep, unless there is a reason to let go."""
    let_go()
    for part in slices(seconds):
        time.sleep(part)
        let_go()


def joined(thread: threading.Thread, seconds: float) -> bool:
    """Wait for the end of a thread; whether it has come in that time."""
    for part in slices(seconds):
        thread.join(part)
        if not thread.is_alive():
            return True
        let_go()
    return not thread.is_alive()


def slices(seconds: float) -> Iterator[float]:
    """A time in parts that are short enough to wait without looking for a reason to let go."""
    while seconds > 0:
        yield min(seconds, _SLICE_S)
        seconds -= _SLICE_S
