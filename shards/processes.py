"""Processes that work for a command: they end when it does, however it does."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """To be called in a process that another one started: be killed when that dies, even by SIGKILL. Linux only.

    One that outlived its parent would go on writing while the same command is at work again.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
