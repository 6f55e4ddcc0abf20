"""Freed memory is kept, which shows in pages that the system need not clear again."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from largescale.parallel.freed_memory import keep_freed_memory
from tests.helpers.ranks import run_ranks

BYTES = 48 * 2**20


def pages_cleared(keep: bool) -> int:
    """In the last five of 20 steps that fill a tensor of a size that glibc would give back."""
    if keep:
        assert keep_freed_memory(torch.device("cpu"))
    counts = []
    for _ in range(20):
        torch.zeros(BYTES, dtype=torch.uint8)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return counts[-1] - counts[-6]


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 35),
    reason="another C library, or one that gives such blocks back in any case",
)
def test_a_step_clears_no_pages_again():
    [kept], [given_back] = (run_ranks(pages_cleared, 1, keep) for keep in (True, False))
    assert kept < given_back / 10


def test_what_the_user_has_set_counts(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    assert not keep_freed_memory(torch.device("cpu"))


def test_a_gpu_has_its_own_allocator():
    assert not keep_freed_memory(torch.device("cuda"))
