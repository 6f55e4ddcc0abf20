from __future__ import annotations

import pytest
import torch

from largescale.evaluate.shares import interval, mcnemar, own_rows, total


def test_one_process_has_all_rows_and_its_counts_are_the_total():
    assert torch.equal(own_rows(5), torch.arange(5))
    assert total(torch.tensor([1, 2])).tolist() == [1.0, 2.0]


def test_the_interval_is_wilson_s():
    # Wilson (1927) for 15 of 50, as tables have it.
    assert interval(0.3, 50) == pytest.approx([0.1910, 0.4375], abs=1e-4)
    low, high = interval(1.0, 20)
    assert 0.8 < low < high <= 1.0


def test_mcnemar_counts_the_images_that_one_alone_gets_right():
    first = [True] * 12 + [False] * 3 + [True, False] * 40
    second = [False] * 12 + [True] * 3 + [True, False] * 40
    found = mcnemar(first, second)
    # Two-sided: 2 * (C(15, 0) + C(15, 1) + C(15, 2) + C(15, 3)) / 2^15.
    assert (found["only_first"], found["only_second"]) == (12, 3) and found["p"] == pytest.approx(2 * 576 / 2**15)
    assert mcnemar(first, first) == {"only_first": 0, "only_second": 0, "p": 1.0}
