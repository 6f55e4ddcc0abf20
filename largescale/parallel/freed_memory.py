"""What a step has freed is kept for the next one, where tensors lie in the C library's memory."""

from __future__ import annotations

import ctypes
import os
import platform

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""
_NEVER = 2**31 - 1
_OF_THE_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory(device: torch.device) -> bool:
    """Let this process keep what tensors on a CPU have freed; true if it will. Not where the user says what glibc does.

    glibc gives large blocks back to the system at once, and the system clears every page before it gives it out again:
    1 to 3% of a step's CPU time with ResNet-18 (benchmarks/results/step_paired.md), 5% with the demo's network. What a
    process holds at most grows by gaps alone: 1 to 3% with either. On GPUs torch keeps memory itself.
    """
    chosen = any(name.startswith(_OF_THE_USER) for name in os.environ)
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc" or chosen:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(parameter, _NEVER) == 1 for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)])
