"""What a step has freed is kept for the next one, where tensors lie in the C library's memory."""

from __future__ import annotations

import ctypes
import os
import platform

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""
_LARGEST = (2**31 - 1, 2**25)
"""Bytes from which on blocks are given back at once: more than any has, or the most that glibc before 2.35 takes."""
_OF_THE_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory(device: torch.device) -> bool:
    """Let this process keep what tensors on a CPU have freed; true if it will. Not where the user says what glibc does.

    glibc gives large blocks back to the system at once, and the system clears every page before it gives it out again:
    6% of an fp32 step's CPU time with ResNet-18 (benchmarks/results/step_paired.md). What a process holds at most grows
    by gaps alone. On GPUs torch keeps memory itself.
    """
    chosen = any(name.startswith(_OF_THE_USER) for name in os.environ)
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc" or chosen:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # The other parameter alone would be worse than none: it ends glibc's own raising of the first.
    taken = any(mallopt(_M_MMAP_THRESHOLD, size) == 1 for size in _LARGEST)
    return taken and mallopt(_M_TRIM_THRESHOLD, _LARGEST[0]) == 1
