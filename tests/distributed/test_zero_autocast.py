"""Half precision under DeepSpeed where it meddles with autocast, as it does on CUDA alone."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.methods.harness import mini, train


def losses(strategy: str) -> list[float]:
    """Of a few steps in bf16, where DeepSpeed asks whether CUDA's autocast is on and is told of the CPU's."""
    of_a_device = torch.is_autocast_enabled
    with patch("torch.is_autocast_enabled", lambda device="cpu": of_a_device(device)):
        return train(mini("swav", f"parallel.strategy={strategy}", "train.precision=bf16"), steps=3)["losses"]


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_it_trains_in_half_precision_all_the_same(strategy):
    assert run_ranks(losses, 1, strategy)[0] == pytest.approx(run_ranks(losses, 1, "ddp")[0], rel=1e-3)
