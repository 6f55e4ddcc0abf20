from __future__ import annotations

import pytest

from largescale.data import loader_counts
from largescale.data.loader_counts import choose_counts


@pytest.mark.parametrize(
    "processes, threads, local_ranks, on_gpu, cpus, expected",
    [
        (-1, 0, 1, True, 16, (4, 3)),
        (-1, 0, 8, True, 128, (4, 3)),
        (-1, 0, 1, False, 2, (1, 1)),
        (-1, 0, 8, False, 2, (1, 1)),
        (3, 2, 1, True, 4, (3, 2)),
        (0, 0, 1, False, 64, (0, 4)),
        (2, 0, 1, True, 64, (2, 4)),
    ],
)
def test_counts_follow_the_cpus(monkeypatch, processes, threads, local_ranks, on_gpu, cpus, expected):
    monkeypatch.setattr(loader_counts, "usable_cpus", lambda: cpus)
    assert choose_counts(processes, threads, local_ranks=local_ranks, on_gpu=on_gpu) == expected
