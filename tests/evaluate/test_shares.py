from __future__ import annotations

import pytest
import torch

from largescale.evaluate.shares import interval, own_rows, total


def test_one_process_has_all_rows_and_its_counts_are_the_total():
    assert torch.equal(own_rows(5), torch.arange(5))
    assert total(torch.tensor([1, 2])).tolist() == [1.0, 2.0]


def test_the_interval_is_wilson_s():
    # Wilson (1927) for 15 of 50, as tables have it.
    assert interval(0.3, 50) == pytest.approx([0.1910, 0.4375], abs=1e-4)
    low, high = interval(1.0, 20)
    assert 0.8 < low < high <= 1.0
